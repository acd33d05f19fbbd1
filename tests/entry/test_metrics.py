"""The reports of a run: the metrics file, Megatron's log line and its validation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from megatron_fdd.ops import blocks
from megatron_fdd.ops.vocab_shard import VocabShard
from megatron_fdd.step.metrics import check_metrics_file
from tests.entry.command import TIMES, Ending, call_main, read_metrics, run, trained
from tests.entry.conftest import Toys
from tests.harness.ranks import Layout, run_on_ranks

GROUPS = ("ce", "kd", "trajectory", "delta")
LAYERS = ("trajectory s1:t2", "trajectory s2:t4", "delta s2:t4")
WEIGHTS = "--fdd-ce-weight 0.25 --fdd-kd-weight 0.5 --fdd-alpha 0.7 --fdd-beta 1.3".split()
LINE = re.compile(r"iteration +(\d+)/")


def values(line: str) -> dict[str, float]:
    """Read `name: 1.5E+00 | ...` from one of Megatron's lines."""
    return {
        name.strip(): float(value) for name, value in re.findall(r"\| ([^|:]+(?::t\d+)?): +([-\d.E+]+)", line)
    }


@pytest.fixture(scope="module")
def written(toy: Toys, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], str]:
    """Return metrics file and output of a run of 4 iterations with all terms, warm-up over 2 and decay over 4."""
    path = tmp_path_factory.mktemp("metrics") / "new folder" / "metrics.jsonl"
    schedule = "--train-iters 4 --fdd-warmup-iters 2 --fdd-decay-iters 4 --eval-interval 2 --eval-iters 1"
    [endings] = trained(toy.command(*WEIGHTS, *schedule.split(), "--fdd-metrics-file", path))
    return read_metrics(path), "".join(ending.out for ending in endings)


@pytest.fixture(scope="module")
def reported(written: tuple[list[dict], str]) -> tuple[list[dict], str]:
    """Return the same without the validations."""
    records, out = written
    return [record for record in records if "tokens" in record], out


def test_one_record_per_iteration_with_every_key(reported: tuple[list[dict], str]) -> None:
    records, _ = reported
    assert [record["iteration"] for record in records] == [1, 2, 3, 4]
    shares = [f"share {name}" for name in GROUPS]
    names = ["iteration", "tokens", "total", *GROUPS, *LAYERS, *shares, "grad_norm", *TIMES]
    for record in records:
        assert list(record) == names
        assert record["tokens"] == 8 * 16
        assert record["seconds"] > 0
        assert record["grad_norm"] > 0


def test_total_is_the_weighted_sum(reported: tuple[list[dict], str]) -> None:
    records, _ = reported
    for record, inner in zip(records, (0.5 * 1, 1 * 0.75, 0.5, 0.25), strict=True):
        parts = [0.25 * record["ce"], 0.5 * record["kd"]]
        parts += [0.7 * inner * record["trajectory"], 1.3 * inner * record["delta"]]
        assert record["total"] == pytest.approx(sum(parts), rel=1e-6)
        for name, part in zip(GROUPS, parts, strict=True):
            assert record[f"share {name}"] == pytest.approx(part / record["total"], rel=1e-5)
        layers = [record["trajectory s1:t2"], record["trajectory s2:t4"]]
        assert record["trajectory"] == pytest.approx(sum(layers) / 2, rel=1e-6)
        assert record["delta"] == record["delta s2:t4"]


def test_with_one_tap_a_step_a_layer_has_its_own_value_or_none(toy: Toys, tmp_path: Path) -> None:
    exact, drawn = tmp_path / "exact.jsonl", tmp_path / "drawn.jsonl"
    still = (*WEIGHTS, "--train-iters", "6", "--lr", "0", "--min-lr", "0")
    trained(
        toy.command(*still, "--fdd-metrics-file", exact),
        toy.command(*still, "--fdd-metrics-file", drawn, "--fdd-sample-one-tap"),
    )
    patterns = set()
    for record, whole in zip(read_metrics(drawn), read_metrics(exact), strict=True):
        seen = tuple(name for name in LAYERS if record[name] is not None)
        patterns.add(seen)
        for name in ("ce", "kd", *seen):
            assert record[name] == pytest.approx(whole[name], rel=1e-5), name
        # The kinds are the estimates that the student was trained on: a mean over two layers, and one delta.
        assert record["trajectory"] == pytest.approx(whole[seen[0]], rel=1e-5)
        assert record["delta"] == pytest.approx(2 * whole[LAYERS[2]] if len(seen) == 2 else 0, rel=1e-5)
        parts = [0.25 * record["ce"], 0.5 * record["kd"], 0.7 * record["trajectory"], 1.3 * record["delta"]]
        assert record["total"] == pytest.approx(sum(parts), rel=1e-6)
    assert patterns == {LAYERS[:1], LAYERS[1:]}


def test_every_term_is_in_the_log_line(reported: tuple[list[dict], str]) -> None:
    records, out = reported
    lines = [line for line in out.splitlines() if LINE.search(line)]
    assert len(lines) == len(records)
    # Megatron's second line has the mean of two iterations.
    for line, record in list(zip(lines, records, strict=True))[2:]:
        logged = values(line)
        for name in ("total", *GROUPS, *LAYERS, "share kd"):
            assert logged[name] == pytest.approx(record[name], rel=1e-5), name


def test_every_term_is_in_the_validation(written: tuple[list[dict], str]) -> None:
    records, out = written
    lines = [line for line in out.splitlines() if "validation loss at iteration" in line]
    assert len(lines) == 3  # after iterations 2 and 4, and at the end of training
    validations = [record for record in records if "tokens" not in record]
    assert [record["iteration"] for record in records] == [1, 2, 2, 3, 4, 4, 4]
    for line, record in zip(lines, validations, strict=True):
        found = dict(re.findall(r"\| ([\w :]+?) value: ([-\d.E+]+)", line))
        for name in ("total", *GROUPS, *LAYERS):
            assert record[f"valid {name}"] > 0
            assert float(found[name]) == pytest.approx(record[f"valid {name}"], rel=1e-5)
        assert len(record) == 1 + len(("total", *GROUPS, *LAYERS))


def test_a_file_of_something_else_is_not_cut(toy: Toys, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("my notes\n")
    [endings] = run(toy.command("--fdd-metrics-file", path))
    assert [ending.status for ending in endings] == [1, 1]
    assert "notes.txt: holds something else than metrics" in endings[0].err
    assert path.read_text() == "my notes\n"
    for ours in "", '{"iter', '{"iteration": 1, "total": 1.0}\n':
        path.write_text(ours)
        check_metrics_file(str(path))


def count_collectives(command: list[str]) -> tuple[Ending, int]:
    """Return, on one rank, the ending of a run, and its number of passes over heads and reductions of Gram matrices."""
    calls = []

    def counted(owner: Any, name: str) -> Any:
        original = getattr(owner, name)

        def call(*arguments: Any) -> Any:
            calls.append(name)
            return original(*arguments)

        return patch.object(owner, name, call)

    with counted(blocks, "start_merge"), counted(VocabShard, "all_reduce"):
        return call_main(command), len(calls)


# Weights that are 0; the remaining terms; passes over the heads in a micro-batch; reductions of Gram matrices.
SWITCHED_OFF = {
    "trajectory": ("--fdd-alpha 0", {"kd", "ce", "delta"}, 3, 2),
    "delta": ("--fdd-beta 0", {"kd", "ce", "trajectory"}, 3, 0),
    "final logits": ("--fdd-kd-weight 0", {"trajectory", "delta"}, 2, 2),
    "inner layers": ("--fdd-alpha 0 --fdd-beta 0", {"kd", "ce"}, 1, 0),
    "all but centred delta": ("--fdd-alpha 0 --fdd-kd-weight 0 --fdd-delta centred", {"delta"}, 0, 2),
    "teacher": ("--fdd-alpha 0 --fdd-beta 0 --fdd-kd-weight 0 --fdd-ce-weight 1", {"ce"}, 1, 0),
}


@pytest.mark.parametrize("name", SWITCHED_OFF)
def test_a_weight_of_zero_switches_a_term_off(name: str, toy: Toys, tmp_path: Path) -> None:
    flags, kept, head_passes, gram_reductions = SWITCHED_OFF[name]
    path = tmp_path / "metrics.jsonl"
    command = toy.command(*flags.split(), *"--train-iters 2 --tensor-model-parallel-size 2".split())
    command += ["--fdd-metrics-file", str(path)]
    results = run_on_ranks(count_collectives, Layout(ranks=2), {"command": command})
    for rank, (ending, collectives) in enumerate(results):
        assert ending.status == 0, ending.err
        has_teacher = bool(kept - {"ce"})
        assert ("teacher cross-entropy" in ending.out) == (has_teacher and rank == 0)
        # There are two steps of four micro-batches. The teacher's check adds one pass and a count of the vocabulary.
        assert collectives == 2 * (4 * head_passes + gram_reductions) + 2 * has_teacher
    for record in read_metrics(path):
        assert {group for group in GROUPS if record[group] is not None} == kept
        assert {layer for layer in LAYERS if layer in record} == {x for x in LAYERS if x.split()[0] in kept}
        assert record["total"] > 0
