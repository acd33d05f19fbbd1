"""`--engine transformers` from the command line, and a student that trains with its store instead of the teacher."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_fdd.data.store.identity import read_identity
from megatron_fdd.host.checkpoint import find_checkpoint, read_checkpoint_args
from megatron_fdd.step.teacher.lens_file import TeacherIdentity
from tests.entry.command import read_metrics, teach_by_transformers, trained
from tests.entry.conftest import Toys

# Float32 in another order of sums, of three steps of the student.
SAME_LOSSES = 1e-5
# A teacher in bfloat16, whose numbers have 8 bits.
NEAR_LOSSES = 1e-2


def test_a_student_learns_from_the_store_what_the_live_teacher_says(toy: Toys, tmp_path: Path) -> None:
    store = tmp_path / "store"
    own = ("--teacher", toy.root / "teacher-hf", "--store", store, "--form", "float32", "--device-map", "cpu")
    # A whole training's command: what is about its data counts.
    done = teach_by_transformers(
        *own, *toy.command("--tensor-model-parallel-size", 2, "--sequence-parallel", "--bf16")
    )
    assert done.returncode == 0, done.stderr
    assert "24 of them are missing. To compute: 24 units, 384 tokens" in done.stdout
    identity = read_identity(store, "--store")
    checkpoint = find_checkpoint(str(toy.teacher), "--teacher-load")
    live = TeacherIdentity.read(checkpoint, read_checkpoint_args(checkpoint, "--teacher-load"))
    assert live == TeacherIdentity(identity.num_layers, identity.hidden_size, identity.final_norm)

    flags = [str(word) for word in toy.command("--fdd-metrics-file", tmp_path / "stored")]
    at = flags.index("--teacher-load")
    flags[at : at + 2] = ["--fdd-teacher-store", str(store)]
    trained(flags, toy.command("--fdd-metrics-file", tmp_path / "live"))
    records = [read_metrics(tmp_path / name) for name in ("stored", "live")]
    assert len(records[0]) == len(records[1]) == 3
    for stored, alive in zip(*records, strict=True):
        names = {name for name in alive if "seconds" not in name}
        assert names == {name for name in stored if "seconds" not in name}
        for name in names:
            assert stored[name] == pytest.approx(alive[name], rel=SAME_LOSSES, abs=1e-9), name


@pytest.mark.tier("all")
def test_a_student_in_float32_reads_a_teacher_in_bfloat16(toy: Toys, tmp_path: Path) -> None:
    store = tmp_path / "store"
    own = ("--teacher", toy.root / "teacher-hf", "--store", store, "--device-map", "cpu")
    looked = teach_by_transformers(*own, *toy.command("--dry-run"))
    assert looked.returncode == 0, looked.stderr
    assert "To compute: 24 units, 384 tokens, 111 kB (bf16, 3 blocks). Free there: " in looked.stdout
    assert "loading the teacher" not in looked.stdout
    assert not store.exists()
    assert teach_by_transformers(*own, *toy.command()).returncode == 0
    flags = [str(word) for word in toy.command("--fdd-metrics-file", tmp_path / "stored")]
    at = flags.index("--teacher-load")
    flags[at : at + 2] = ["--fdd-teacher-store", str(store)]
    [stored, _] = trained(flags, toy.command("--fdd-metrics-file", tmp_path / "live"))
    assert "it ran in bfloat16 (attention sdpa, quantisation no, transformers " in stored[0].out
    assert (
        "in which its head is and its features are unpacked; the student computes in float32" in stored[0].out
    )
    records = [read_metrics(tmp_path / name) for name in ("stored", "live")]
    for rounded, exact in zip(*records, strict=True):
        assert rounded["total"] == pytest.approx(exact["total"], rel=NEAR_LOSSES)
        assert rounded["total"] != exact["total"]


def test_an_error_is_one_line(toy: Toys, tmp_path: Path) -> None:
    done = teach_by_transformers("--teacher", toy.teacher, "--store", tmp_path, *toy.command())
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith(f"megatron_fdd: error: {toy.teacher} is not a Hugging Face model folder")
