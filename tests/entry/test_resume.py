"""Resumption: a run that was interrupted at any moment writes the metrics of one that never was."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from tests.entry.checks import assert_refused
from tests.entry.command import Ending, call_main, read_metrics, run, trained, without_seconds
from tests.entry.conftest import SCRATCH, Toys
from tests.harness.ranks import Layout, run_on_ranks

SAMPLED = ("--fdd-sample-tokens", "0.3", "--fdd-sample-one-tap")
DISTRIBUTED = ("--use-distributed-optimizer", "--train-iters", "6", "--save-interval", "2")


def command(toy: Toys, folder: Path, *more: str) -> list[str]:
    """Return one command for the first start and for every resumption."""
    places = ["--load", folder, "--save", folder, "--pretrained-checkpoint", toy.student]
    return toy.command(*DISTRIBUTED, *places, "--fdd-metrics-file", folder / "metrics.jsonl", *more)


def kill_while_writing(folder: Path, iteration: int) -> None:
    """Make the files of `--exit-interval 3` look like those of a run that was killed while it wrote metrics.

    The metrics are those of `iteration`. Half of the checkpoint of iteration 4 is left too, as after a slightly later
    kill.
    """
    (folder / "iter_0000003").rename(folder / "iter_0000004")
    (folder / "iter_0000004" / ".metadata").unlink()
    (folder / "latest_checkpointed_iteration.txt").write_text("2")
    path = folder / "metrics.jsonl"
    whole = path.read_text().splitlines(keepends=True)[: iteration - 1]
    path.write_text("".join([*whole, f'{{"iteration": {iteration}, "tok']))


def metrics(folder: Path) -> list[dict]:
    return without_seconds(read_metrics(folder / "metrics.jsonl"))


@pytest.mark.parametrize(
    ("more", "torn"), [((), 4), pytest.param(("--bf16", *SAMPLED), 3, marks=pytest.mark.tier("all"))]
)
def test_a_killed_run_resumes_bit_for_bit(
    more: tuple[str, ...], torn: int, toy: Toys, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    trained(command(toy, whole, *more), command(toy, killed, *more, "--exit-interval", "3"))
    assert [record["iteration"] for record in metrics(killed)] == [1, 2, 3]
    kill_while_writing(killed, torn)
    [endings] = trained(command(toy, killed, *more))
    assert "at iteration 2" in endings[0].out
    assert len(metrics(whole)) == 6
    assert metrics(killed) == metrics(whole)


def test_another_length_of_training_is_refused(toy: Toys, tmp_path: Path) -> None:
    """Megatron's schedules depend on the number of iterations."""
    trained(command(toy, tmp_path, "--train-iters", "2"))
    [endings] = run(command(toy, tmp_path, "--train-iters", "4"))
    assert_refused(endings, r"--load .*schedules of .*--override-opt_param-scheduler")
    trained(command(toy, tmp_path, "--train-iters", "4", "--override-opt_param-scheduler"))
    assert len(metrics(tmp_path)) == 4


OTHER_RATES = ("--lr", "1e-3", "--min-lr", "1e-4", "--weight-decay", "0.1")
OVERRIDE, USE_SAVED = "--override-opt_param-scheduler", "--use-checkpoint-opt_param-scheduler"
TWO = ("--tensor-model-parallel-size", "2")


def shown_rates(ending: Ending) -> list[str]:
    """Return the learning rates that the terminal shows: after each step, that of the next one."""
    return re.findall(r"^step .*\| lr (\S+) ", ending.out, re.MULTILINE)


@pytest.mark.tier("all")
@pytest.mark.parametrize("is_distributed", [True, False], ids=["distributed", "plain"])
def test_resumes_at_other_rates(is_distributed: bool, toy: Toys, tmp_path: Path) -> None:
    """The optimizer's state is the saved one; the rates are those that a flag names, from the next step on."""

    def begun(name: str, *more: str) -> list[str]:
        words = command(toy, tmp_path / name, "--decoupled-lr", "2e-3", *more)
        return words if is_distributed else [word for word in words if word != DISTRIBUTED[0]]

    trained(begun("whole"), begun("first", "--exit-interval", "2"))
    for name in ("same", "saved", "moved", "alien"):
        shutil.copytree(tmp_path / "first", tmp_path / name)
    endings = run(
        begun("first", *OTHER_RATES),
        begun("alien", "--decoupled-lr", "1e-4"),
        begun("same", OVERRIDE),
        begun("saved", *OTHER_RATES, USE_SAVED),
        begun("moved", *OTHER_RATES, OVERRIDE, *TWO),
        begun("moved", *OTHER_RATES, "--train-iters", "7", OVERRIDE),
    )
    assert_refused(
        endings[0], "--lr is 0.001 here and 0.003 there; .*--min-lr.*weight decay.*0.1 here.*" + OVERRIDE
    )
    assert_refused(endings[1], "has other groups of parameters, or other rates .*" + OVERRIDE)
    assert [ranks[0].status for ranks in endings[2:]] == [0, 0, 0, 0]
    assert metrics(tmp_path / "same") == metrics(tmp_path / "saved") == metrics(tmp_path / "whole")
    own, saved = ["8.5e-04", "7.0e-04", "5.5e-04", "4.0e-04"], ["2.5e-03", "2.0e-03", "1.5e-03", "1.0e-03"]
    assert [shown_rates(ranks[0]) for ranks in endings[2:]] == [saved, saved, own, ["2.5e-04"]]
    before, after = metrics(tmp_path / "whole"), metrics(tmp_path / "moved")
    assert after[2] == pytest.approx(before[2], rel=1e-5, abs=1e-6)  # the same weights
    assert after[3]["total"] != pytest.approx(before[3]["total"], rel=1e-3)


@pytest.mark.tier("all")
def test_a_student_from_scratch_resumes_with_the_same_command(toy: Toys, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def scratch(folder: Path, *more: str) -> list[str]:
        words = [word for word in toy.command() if word != "--use-checkpoint-args"]
        places = ["--load", folder, "--save", folder, "--fdd-metrics-file", folder / "metrics.jsonl"]
        return [*words, *SCRATCH, *DISTRIBUTED, *map(str, places), *more]

    trained(scratch(whole), scratch(killed, "--exit-interval", "3"))
    kill_while_writing(killed, 4)
    trained(scratch(killed))
    assert len(metrics(whole)) == 6
    assert metrics(killed) == metrics(whole)


@pytest.mark.tier("all")
def test_resumes_at_another_tensor_parallel_size(toy: Toys, tmp_path: Path) -> None:
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    two = ("--tensor-model-parallel-size", "2")
    trained(command(toy, whole, *two), command(toy, moved, *two, "--exit-interval", "2"), command(toy, moved))
    assert len(metrics(whole)) == 6
    for record, other in zip(metrics(moved), metrics(whole), strict=True):
        assert record == pytest.approx(other, rel=1e-5, abs=1e-6)


# Each parameter has a bucket, so that the output layer's new value arrives in a bucket of its own.
OVERLAP = ("--overlap-grad-reduce", "--overlap-param-gather", "--ddp-bucket-size", "1")


@pytest.mark.parametrize("head", ["detached", "live"])
def test_overlap_changes_nothing(head: str, toy: Toys, tmp_path: Path) -> None:
    plain, overlapped = tmp_path / "plain", tmp_path / "overlapped"
    lens = ("--fdd-lens-head", head, "--train-iters", "4", "--eval-interval", "2", "--eval-iters", "1")
    trained(command(toy, plain, *lens), command(toy, overlapped, *lens, *OVERLAP))
    assert len(metrics(plain)) == 4 + 3  # validations after steps 2 and 4, and at the end
    for record, other in zip(metrics(overlapped), metrics(plain), strict=True):
        assert record == pytest.approx(other, rel=1e-5, abs=1e-6)


def test_overlap_without_the_final_logits(toy: Toys, tmp_path: Path) -> None:
    """Then the head has no gradient that its bucket could wait for."""
    trained(command(toy, tmp_path / "overlapped", "--fdd-kd-weight", "0", *OVERLAP, "--train-iters", "3"))
    assert len(metrics(tmp_path / "overlapped")) == 3


def stale_head(model: GPTModel) -> Tensor:
    """Read the head like a program that does not know when a gathered parameter has arrived."""
    return model.output_layer.weight


def run_stale(arguments: list[str]) -> bool:
    """Whether, on one rank, Megatron itself noticed that nobody waited for a bucket."""
    with patch("megatron_fdd.step.lens.read_head", stale_head):
        try:
            call_main(arguments)
        except AssertionError:
            return True
    return False


def test_a_stale_head_would_be_noticed(toy: Toys, tmp_path: Path) -> None:
    plain, stale = tmp_path / "plain", tmp_path / "stale"
    trained(command(toy, plain))
    noticed = run_on_ranks(run_stale, Layout(ranks=2), {"arguments": command(toy, stale, *OVERLAP)})
    errors = [abs(a["total"] / b["total"] - 1) for a, b in zip(metrics(stale), metrics(plain), strict=False)]
    assert all(noticed) or max(errors) > 1e-4  # test_overlap_changes_nothing allows 1e-5
