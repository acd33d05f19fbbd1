"""`fdd teach`, then a training with `--fdd-teacher-store`: it learns what it learns from the live teacher."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_fdd.data.store.store import Store
from tests.entry.checks import assert_refused
from tests.entry.command import TIMES, read_metrics, run, trained
from tests.entry.conftest import Toys

EVALUATION = "--eval-iters 1".split()
# Sums in another order.
RELATIVE = 2e-6
# The toy's micro-batches: 2 rows of 16 tokens.
MICRO_BATCH_TOKENS = 32


def teach(toy: Toys, store: Path, *more: object) -> list[str]:
    """Return the command of a producer for the data of `stored_run`."""
    own = ("--engine", "megatron", "--teacher", toy.teacher, "--store", store, "--form", "float32")
    return ["teach", *map(str, own), *toy.command(*EVALUATION, *more)]


def stored_run(toy: Toys, store: Path, metrics: Path, *more: object) -> list[str]:
    """Return the command of a training that reads a store."""
    live = toy.command(*EVALUATION, "--fdd-metrics-file", metrics, *more)
    at = live.index("--teacher-load")
    return [*live[:at], "--fdd-teacher-store", str(store), *live[at + 2 :]]


def assert_same(metrics: Path, wanted: Path) -> None:
    for record, other in zip(read_metrics(metrics), read_metrics(wanted), strict=True):
        for name, value in other.items():
            if name not in TIMES:
                assert record[name] == pytest.approx(value, rel=RELATIVE), name


def test_a_store_takes_the_teachers_place(toy: Toys, tmp_path: Path) -> None:
    """The producer's layout is not the student's; a training that stops goes on at another one."""
    store, save = tmp_path / "store", ("--save", tmp_path / "run", "--save-interval", 2)
    live, stored = tmp_path / "live.jsonl", tmp_path / "stored.jsonl"
    pipeline = "--pipeline-model-parallel-size 2".split()
    tensor = "--tensor-model-parallel-size 2 --sequence-parallel".split()
    taught, again, _, _, went_on = trained(
        teach(toy, store, *tensor),
        teach(toy, store, "--part", "0/1"),
        toy.command(*EVALUATION, "--fdd-metrics-file", live),
        stored_run(toy, store, stored, *pipeline, *save, "--exit-interval", 2),
        [
            *stored_run(toy, store, stored, *tensor, *save),
            *("--load", str(tmp_path / "run")),
        ],
    )
    assert "The run reads 32 units of 512 tokens; 32 are different, 0 are read again (0%).\n" in taught[0].out
    assert "To compute: 32 units, 512 tokens, 0.000 GB (float32, 3 blocks).\n" in taught[0].out
    assert "0 of them are missing. To compute: 0 units" in again[0].out
    assert f"all 32 units of this run's data are in {store} " in went_on[0].out
    assert_same(stored, live)
    identity = Store.open(store, "--store").identity
    assert (identity.blocks, identity.num_layers, identity.form) == ([2, 4, 6], 6, "float32")


@pytest.mark.tier("all")
def test_the_same_micro_batches_give_the_same_bits(toy: Toys, tmp_path: Path) -> None:
    """In float32 the log of a stored run is that of a live one to the last digit, not only to `RELATIVE`."""
    store, live, stored = tmp_path / "store", tmp_path / "live.jsonl", tmp_path / "stored.jsonl"
    trained(
        teach(toy, store, "--batch-tokens", MICRO_BATCH_TOKENS),
        toy.command(*EVALUATION, "--fdd-metrics-file", live),
        stored_run(toy, store, stored),
        ranks=1,
    )
    for record, other in zip(read_metrics(stored), read_metrics(live), strict=True):
        assert {name: record[name] for name in other.keys() - TIMES} == {
            name: value for name, value in other.items() if name not in TIMES
        }


def test_what_a_store_lacks_is_refused(toy: Toys, tmp_path: Path) -> None:
    store, metrics = tmp_path / "store", tmp_path / "metrics.jsonl"
    trained(teach(toy, store), ranks=1)
    longer, other_blocks, other_form, two_teachers, masked, *_ = run(
        stored_run(toy, store, metrics, "--train-iters", 5),
        stored_run(toy, store, metrics, "--fdd-layer-pairs", "1:1,2:4"),
        [*teach(toy, store), "--form", "int8"],
        toy.command("--fdd-teacher-store", store),
        stored_run(toy, store, metrics, "--reset-attention-mask"),
    )
    assert_refused(longer, "lacks 16 units of this run's data, 256 tokens; the first: training sample 24")
    assert_refused(other_blocks, r"has the teacher's blocks \[2, 4, 6\], and this run compares \[1, 4\]")
    assert_refused(
        other_form, "holds the features of something else: its form is float32, and here it is int8"
    )
    assert_refused(two_teachers, "a run has one teacher; leave one out")
    assert_refused(masked, "--reset-attention-mask with --fdd-teacher-store")
