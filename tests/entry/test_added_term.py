"""Terms that learn, in whole runs: saved, resumed at another layout, exported without them, never silently lost."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing import load_plain_tensors
from torch import Tensor

from megatron_fdd import convert
from megatron_fdd.config import FddConfig
from megatron_fdd.host.checkpoint import find_checkpoint, term_shapes
from megatron_fdd.losses.term_modules import make_modules
from tests.entry.checks import assert_refused
from tests.entry.command import Ending, read_metrics, run_commands, without_seconds
from tests.entry.conftest import Toys
from tests.harness.ranks import Layout, run_on_ranks
from tests.oracle.added_term import EXAMPLE, known, own_table

PLUGIN = ("--fdd-plugin", EXAMPLE)
LEARNED = (*PLUGIN, "--fdd-term", "learned_mse=0.7")
STOCK = ("--use-distributed-optimizer", "--train-iters", "4", "--save-interval", "4", "--weight-decay", "0.1")
TP2 = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
PP2 = ("--pipeline-model-parallel-size", "2")
NAMES = {f"fdd_terms.learned_mse.{pair}.weight" for pair in (0, 1)}
SHAPE = (48, 32)


def run_example(commands: list[list[str]]) -> list[Ending]:
    """Run, on every rank, the entry point, and then forget the terms of the example."""
    with own_table():
        return run_commands(commands)


def start(*commands: Sequence[str]) -> list[list[Ending]]:
    arguments: dict[str, Any] = {"commands": [list(command) for command in commands]}
    by_rank = run_on_ranks(run_example, Layout(ranks=2), arguments)
    return [list(endings) for endings in zip(*by_rank, strict=True)]


def trained(*commands: Sequence[str]) -> list[list[Ending]]:
    results = start(*commands)
    for endings in results:
        for ending in endings:
            assert ending.status == 0, ending.err
    return results


def command(toy: Toys, folder: Path, *more: str) -> list[str]:
    """Return one command for the first start and for every resumption."""
    places = ["--load", folder, "--save", folder, "--pretrained-checkpoint", toy.student]
    return toy.command(*STOCK, *places, "--fdd-metrics-file", folder / "metrics.jsonl", *more)


def metrics(folder: Path) -> list[dict]:
    """Return the records without the terms that have no weight."""
    records = without_seconds(read_metrics(folder / "metrics.jsonl"))
    return [{name: value for name, value in record.items() if value is not None} for record in records]


@pytest.mark.tier("all")
def test_a_run_goes_on_at_another_layout_and_is_exported_without_them(toy: Toys, tmp_path: Path) -> None:
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    trained(
        command(toy, whole, *LEARNED, *TP2),
        command(toy, moved, *LEARNED, *TP2, "--exit-interval", "2"),
        command(toy, moved, *LEARNED, *PP2),
    )
    assert [record["iteration"] for record in metrics(moved)] == [1, 2, 3, 4]
    for record, other in zip(metrics(moved), metrics(whole), strict=True):
        assert record == pytest.approx(other, rel=1e-5, abs=1e-6)
    assert metrics(whole)[3]["learned_mse"] < metrics(whole)[0]["learned_mse"]
    assert term_shapes(find_checkpoint(str(moved), "--load"), "--load") == dict.fromkeys(NAMES, SHAPE)
    exported = run_on_ranks(export, Layout(ranks=1), {"load": moved, "hf_out": tmp_path / "hf"})[0]
    assert set(exported["left_out"]) == NAMES


def export(load: Path, hf_out: Path) -> dict[str, Any]:
    """Export a checkpoint on one rank; return the report of the conversion."""
    return dataclasses.asdict(convert.mcore_to_hf(load, hf_out))


@pytest.mark.tier("all")
def test_a_checkpoint_that_has_them_is_a_teacher_or_a_student_without_them(toy: Toys, tmp_path: Path) -> None:
    """A run that cannot continue from the optimizer's state is refused."""
    one = ("--train-iters", "1")
    dropped, fewer, tuned, taught = start(
        command(toy, tmp_path, *LEARNED, *one),
        command(toy, tmp_path, *one),
        command(toy, tmp_path, *LEARNED, *one, "--fdd-layer-pairs", "2:3", "--fdd-beta", "0"),
        toy.command(*STOCK, *one, "--load", tmp_path, "--finetune"),
        toy.command(*STOCK, *one, "--teacher-load", tmp_path),
    )[1:]
    remedy = "give the same --fdd-plugin.*--finetune"
    assert_refused(
        dropped, rf"--load {tmp_path}: .*only there: fdd_terms.learned_mse.0.weight, .*\); {remedy}"
    )
    assert_refused(fewer, rf"only there: fdd_terms.learned_mse.1.weight\); {remedy}")
    for endings, flag in ((tuned, "--load"), (taught, "--teacher-load")):
        assert [ending.status for ending in endings] == [0, 0], endings[0].err
        assert f"{flag} {tmp_path}: holds 2 parameters of terms" in endings[0].err


def test_what_a_checkpoint_lacks_begins_anew_without_its_optimizer(toy: Toys, tmp_path: Path) -> None:
    """Parameters in the checkpoint keep their values: a learning rate of 0 changes none."""
    first, second = tmp_path / "first", tmp_path / "second"
    two, still = ("--train-iters", "2"), ("--lr", "0", "--save", str(second), "--save-interval", "2")
    moved, refused, tuned = start(
        command(toy, first, *LEARNED, *two),
        command(toy, first, *LEARNED, *two, "--fdd-layer-pairs", "1:1,3:5"),
        command(toy, first, *LEARNED, *two, "--fdd-layers", "3"),
        toy.command(*LEARNED, *two, *still, "--fdd-layers", "3", "--load", first, "--finetune"),
    )[1:]
    assert_refused(
        moved, r"its terms learned for the layers s\d:t\d, .* and this run compares s1:t1, s3:t5; give the"
    )
    assert_refused(refused, r"only here: fdd_terms.learned_mse.2.weight\); give")
    assert [ending.status for ending in tuned] == [0, 0], tuned[0].err
    before, after = (run_on_ranks(read, Layout(ranks=1), {"folder": folder})[0] for folder in (first, second))
    assert before.keys() == NAMES
    with known():
        config = FddConfig(teacher_load="T", term=(("learned_mse", 1.0),))
        fresh = make_modules(config, range(3), SHAPE[::-1])
    for pair in range(3):
        name, made = f"fdd_terms.learned_mse.{pair}.weight", fresh["learned_mse", pair].weight
        assert torch.equal(after[name], before.get(name, made.detach()))
        assert name not in before or not torch.equal(before[name], made)


def read(folder: Path) -> dict[str, Tensor]:
    """Return, on one rank, the learned parameters of terms."""
    path = find_checkpoint(str(folder), "--load")
    names = term_shapes(path, "--load")
    return {name: value for name, value in load_plain_tensors(str(path)).items() if name in names}


@pytest.mark.tier("all")
def test_overlap_changes_nothing(toy: Toys, tmp_path: Path) -> None:
    """Each parameter has a bucket, each step one tap: the other projection's bucket waits for its gradient too."""
    plain, overlapped = tmp_path / "plain", tmp_path / "overlapped"
    drawn = (*LEARNED, "--fdd-sample-one-tap", "--bf16")
    overlap = ("--overlap-grad-reduce", "--overlap-param-gather", "--ddp-bucket-size", "1")
    trained(command(toy, plain, *drawn), command(toy, overlapped, *drawn, *overlap))
    assert len(metrics(plain)) == 4
    for record, other in zip(metrics(overlapped), metrics(plain), strict=True):
        assert record == pytest.approx(other, rel=1e-5, abs=1e-6)
