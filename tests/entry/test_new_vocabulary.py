"""A student of another family learns from a teacher whose vocabulary it was given."""

from __future__ import annotations

from pathlib import Path

from megatron_fdd import convert
from tests.convert import toys
from tests.convert.toy_vocabularies import write_byte_level
from tests.entry.checks import assert_refused
from tests.entry.command import read_metrics, run, trained
from tests.entry.conftest import STUDENT, Toys
from tests.harness.ranks import Layout, run_on_ranks


def _import(folder: Path, save: Path) -> None:
    convert.hf_to_mcore(folder, save)


def test_training_takes_a_student_with_the_teachers_vocabulary(toy: Toys, tmp_path: Path) -> None:
    student = toys.make_llama(tmp_path / "hf", tokenizer=False, **{**STUDENT, "vocab_size": 452})
    write_byte_level(student)
    convert.replace_vocabulary(student, toy.teacher, tmp_path / "new-hf")
    for name, folder in (("old", student), ("new", tmp_path / "new-hf")):
        run_on_ranks(_import, Layout(ranks=1), {"folder": folder, "save": tmp_path / name})
    [[refused]] = run(toy.command("--load", tmp_path / "old"), ranks=1)
    assert_refused([refused], "tokenizer")
    metrics = tmp_path / "metrics.jsonl"
    trained(toy.command("--load", tmp_path / "new", "--finetune", "--fdd-metrics-file", metrics), ranks=1)
    assert len([record for record in read_metrics(metrics) if "step" in record or "iteration" in record]) >= 3
