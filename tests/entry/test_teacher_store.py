"""`fdd teach`, then a training with `--fdd-teacher-store`: it learns what it learns from the live teacher."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from megatron_fdd.data.store.index import INDEX_FILE, Index, write_index
from megatron_fdd.data.store.store import Store
from tests.entry.checks import assert_refused
from tests.entry.command import TIMES, Patch, read_metrics, run, trained
from tests.entry.conftest import Toys
from tests.entry.damage import with_tensor
from tests.entry.stored import EVALUATION, RELATIVE, stored_run, teach

# The toy's micro-batches: 2 rows of 16 tokens.
MICRO_BATCH_TOKENS = 32


def assert_same(metrics: Path, wanted: Path) -> None:
    for record, other in zip(read_metrics(metrics), read_metrics(wanted), strict=True):
        for name, value in other.items():
            if name not in TIMES:
                assert record[name] == pytest.approx(value, rel=RELATIVE), name


def write_once(store: Path, digest: str, index: Index) -> None:
    """Write an index where none is: the next time the store is one to be read only."""
    if (store / INDEX_FILE).exists():
        raise ValueError(f"{store}: Read-only file system")
    write_index(store, digest, index)


def test_a_store_takes_the_teachers_place(toy: Toys, tmp_path: Path) -> None:
    """The producer's layout is not the student's; a training that stops goes on at another one."""
    store, save = tmp_path / "store", ("--save", tmp_path / "run", "--save-interval", 2)
    live, stored = tmp_path / "live.jsonl", tmp_path / "stored.jsonl"
    pipeline = "--pipeline-model-parallel-size 2".split()
    tensor = "--tensor-model-parallel-size 2 --sequence-parallel".split()
    looked, taught, again, _, _, went_on = trained(
        [*teach(toy, store, *tensor), "--dry-run"],
        teach(toy, store, *tensor),
        teach(toy, store, "--part", "0/1"),
        toy.command(*EVALUATION, "--fdd-metrics-file", live),
        stored_run(toy, store, stored, *pipeline, *save, "--exit-interval", 2, "--num-workers", 2),
        [
            *stored_run(toy, store, stored, *tensor, *save),
            *("--load", str(tmp_path / "run")),
        ],
        patches=[Patch("megatron_fdd.data.store.store", "write_index", write_once)],
    )
    assert "The run reads 32 units of 512 tokens; 32 are different, 0 are read again (0%).\n" in taught[0].out
    assert "A second epoch would read other rows of text" in taught[0].out
    assert "To compute: 32 units, 512 tokens, 295 kB (float32, 3 blocks). Free there: " in taught[0].out
    for line in ("The run reads 32 units of 512 tokens; 32", "To compute: 32 units, 512 tokens, 295 kB"):
        assert line in looked[0].out
    assert "loading the teacher" in taught[0].out
    assert "loading the teacher" not in looked[0].out + again[0].out
    assert "0 of them are missing. To compute: 0 units" in again[0].out
    assert "its weights were not compared" in again[0].out
    assert "its weights were not compared" not in taught[0].out + looked[0].out
    assert f"all 32 units of this run's data are in {store} (which were counted before, " in went_on[0].out
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


@pytest.mark.tier("all")
def test_a_store_has_one_teacher_at_any_layout(toy: Toys, tmp_path: Path) -> None:
    """Its weights are compared, whole: a merged adapter changes no norm, and is another teacher."""
    store, steps = tmp_path / "store", "--train-iters"
    trained(
        teach(toy, store, *"--tensor-model-parallel-size 2 --sequence-parallel".split(), steps, 1),
        teach(toy, store, *"--pipeline-model-parallel-size 2".split(), steps, 2),
        teach(toy, store, steps, 3),
    )
    name = "model.layers.4.self_attn.v_proj.weight"
    other = teach(toy, store, steps, 4)
    other[other.index("--teacher") + 1] = str(
        with_tensor(toy.root / "teacher-hf", tmp_path / "other", name, 0.01)
    )
    (refused,) = run(other)
    assert_refused(refused, "holds the features of something else: the weights of .+ there, and of .+ here")
    assert len(Store.open(store, "--store").index) == 32


def not_loaded(*_: object, **__: object) -> None:
    raise AssertionError("a checkpoint is loaded")


def test_what_a_store_lacks_is_refused(toy: Toys, tmp_path: Path) -> None:
    """Before a model is loaded."""
    store, metrics = tmp_path / "store", tmp_path / "metrics.jsonl"
    trained(teach(toy, store), ranks=1)
    longer, other_blocks, other_form, two_teachers, masked, in_int8, in_fp8 = run(
        stored_run(toy, store, metrics, "--train-iters", 5),
        stored_run(toy, store, metrics, "--fdd-layer-pairs", "1:1,2:4"),
        [*teach(toy, store), "--form", "int8"],
        toy.command("--fdd-teacher-store", store),
        stored_run(toy, store, metrics, "--reset-attention-mask"),
        stored_run(toy, store, metrics, "--fdd-tap-dtype", "int8"),
        teach(toy, tmp_path / "fp8", "--teacher-fp8-format", "e4m3"),
        patches=[Patch("megatron.training.training", "load_checkpoint", not_loaded)],
    )
    assert_refused(
        longer,
        r"lacks 16 units .*, 256 tokens; the first: training sample 24, .*\(document \d+ of",
        most=2000,  # with a whole command
    )
    assert_refused(in_int8, "has hidden states in float32, which are read as they are; leave it out")
    assert_refused(in_fp8, "--teacher-fp8-format: a rehearsal on CPUs has no FP8, and the store would hold")
    assert not (tmp_path / "fp8").exists()
    assert_refused(other_blocks, r"has the teacher's blocks \[2, 4, 6\], and this run compares \[1, 4\]")
    assert_refused(other_form, "holds the features of something else: form float32 there, and int8 here")
    assert "loading the teacher" not in other_form[0].out
    assert_refused(two_teachers, "a run has one teacher; leave one out")
    assert_refused(masked, "--reset-attention-mask with --fdd-teacher-store")


@pytest.mark.tier("all")
def test_the_command_that_a_refusal_names_adds_what_is_missing(toy: Toys, tmp_path: Path) -> None:
    """And a segment that is cut off behind the index's back is found before the first step."""
    store, metrics = tmp_path / "the store", tmp_path / "metrics.jsonl"
    longer = stored_run(toy, store, metrics, "--train-iters", 5)
    _, refused = run(teach(toy, store, "--bf16", "--form", "int8"), longer, ranks=1)
    command = shlex.split(refused[0].err.strip().partition("in the teacher's layout: ")[2])
    assert command[:2] == ["fdd", "teach"]
    assert "--bf16" in command
    trained(command[1:], longer, ranks=1)
    segment = next((store / "segments").glob("*/*.safetensors"))
    os.truncate(segment, segment.stat().st_size - 1)
    records = read_metrics(metrics)
    cut_off, not_taught = run(longer, command[1:], ranks=1)
    assert read_metrics(metrics) == records
    for endings in (cut_off, not_taught):
        assert_refused(
            endings, rf"{segment.name}: has \d+ bytes, which is not what its header says: cut off; run"
        )


def full_disk(_: object) -> int:
    return 1000


def test_a_dry_run_writes_nothing_and_a_full_disk_is_refused_before_the_teacher_is_loaded(
    toy: Toys, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    patches = [Patch("megatron_fdd.teach.survey", "free_bytes", full_disk)]
    full, looked = run(teach(toy, store), [*teach(toy, store), "--dry-run"], patches=patches)
    for endings in (full, looked):
        assert_refused(
            endings,
            r"what is missing takes 2\d\d kB \(\d+ bytes\), and 1 kB \(1000 bytes\) are free there",
        )
        assert "To compute: 32 units" in endings[0].out
        assert "loading the teacher" not in endings[0].out
    [done] = trained([*teach(toy, store), "--dry-run", "--log-folder", str(tmp_path / "logs")])
    assert "To compute: 32 units" in done[0].out
    assert not store.exists()
