"""The command that makes students, as a user runs it, and the help of all three tools."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from unittest import mock

import pytest

from tests.convert import toys
from tests.convert.toy_vocabularies import make_student, make_teacher


def _main(tool: str, *words: str) -> int:
    """Run a tool's command in this process and return its exit status."""
    command = importlib.import_module(f"megatron_fdd.cli.{tool}").command
    with pytest.raises(SystemExit) as stopped:
        command(list(words))
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def test_init_student(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = toys.make_llama(tmp_path / "source", tokenizer=False)
    command = ["--hf-model", str(source), "--num-layers", "2", "--hf-out", str(tmp_path / "student")]
    assert _main("init_student", *command, "--no-score") == 0
    first, pairs = capsys.readouterr().out.splitlines()[-2:]
    assert first.endswith("2 layers of " + str(source) + ": 0,2")
    assert pairs == "pairs of layers with one origin, for the training: --fdd-layer-pairs 1:1"
    assert _main("init_student", *command) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert "not empty" in error


def test_a_narrower_student(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, text = toys.make_llama(tmp_path / "source"), tmp_path / "text.jsonl"
    text.write_text('{"text": "the quick brown fox jumps over the lazy dog"}\n' * 20)
    command = ["--from", str(source), "--ffn-hidden-size", "40", "--calibration-text", str(text), "--hf-out"]
    assert _main("init_student", *command, str(tmp_path / "new"), "--layers", "0,2") == 0
    first, scored, _pairs, bits = capsys.readouterr().out.splitlines()[-4:]
    assert first.endswith(f"2 layers of {source}: 0,2; ffn-hidden-size 40")
    assert re.fullmatch(rf"scored on \d windows of 64 tokens of {text}", scored)
    assert re.fullmatch(r"bits a byte, of a text of 860 bytes: .* before, .* now, without training", bits)
    assert toys.read_json(tmp_path / "new" / "config.json")["intermediate_size"] == 40
    text.write_text('{"text": "the fox"}\n')
    assert _main("init_student", *command, str(tmp_path / "short")) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(
        r"--calibration-text .*text.jsonl is too short \(the text has \d+ tokens, one window needs 65: give more",
        error,
    )
    text.write_text('{"text": " "}\n')
    assert _main("init_student", *command, str(tmp_path / "empty")) == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith("text.jsonl: holds no text; give another")
    assert not (tmp_path / "short").exists()


def test_a_dense_student(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, text = toys.make_llama(tmp_path / "source", "qwen3_moe"), tmp_path / "text.jsonl"
    text.write_text('{"text": "the quick brown fox jumps over the lazy dog"}\n' * 20)
    command = ["--hf-model", str(source), "--calibration-text", str(text), "--layers", "0,2"]
    dense = [*command, "--dense-ffn-hidden-size", "40", "--hf-out"]
    assert _main("init_student", *dense, str(tmp_path / "new")) == 0
    first, fitted, _pairs, bits = capsys.readouterr().out.splitlines()[-4:]
    assert first.endswith(f"2 layers of {source}: 0,2; a qwen3 with 40 of 144 channels in each MLP")
    few = r", \d\.\d tokens for a channel; ten fit better: --calibration-samples 7, if the text has them"
    assert re.fullmatch(rf"fitted to \d windows of 64 tokens of {text}{few}", fitted)
    assert re.fullmatch(r"bits a byte, of a text of 860 bytes: .* before, .* now, without training", bits)
    with mock.patch("transformers.AutoModelForCausalLM.from_pretrained", side_effect=AssertionError):
        few = [*command, "--dense-ffn-hidden-size", "70", "--calibration-samples", "1", "--hf-out"]
        assert _main("init_student", *few, str(tmp_path / "few")) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert "--dense-ffn-hidden-size 70: 1 windows of 64 tokens of" in told
    assert not (tmp_path / "few").exists()


def test_a_student_with_a_teachers_vocabulary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student, teacher = make_student(tmp_path / "student"), make_teacher(tmp_path / "teacher")
    (tmp_path / "text.jsonl").write_text('{"text": "the fox quit."}\n')
    command = ["--from", str(student), "--vocabulary-of", str(teacher), "--hf-out"]
    text = ["--validation-text", str(tmp_path / "text.jsonl")]
    assert _main("init_student", *command, str(tmp_path / "new"), *text) == 0
    first, rows, bits = capsys.readouterr().out.splitlines()[-3:]
    assert first == f"{tmp_path}/new: {student} with the vocabulary of {teacher}"
    assert re.fullmatch(
        r"500 rows: \d+ kept, \d+ made of their old pieces, \d+ without pieces",
        rows,
    )
    number = r"\d+\.\d{3} \(\d+ tokens\)"
    assert re.fullmatch(
        f"bits a byte, of a text of 13 bytes: {number} before, {number} now, without training", bits
    )
    assert _main("init_student", *command, str(tmp_path / "quick"), "--no-score") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/quick: {student} with the vocabulary of {teacher}",
        rows,
    ]
    with mock.patch("megatron_fdd.evaluate.bits.compare_bits", side_effect=ValueError("no such class")):
        assert _main("init_student", *command, str(tmp_path / "other")) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-1] == rows
    assert (
        f"warning: {tmp_path}/other is written, and its bits a byte are not known: no such class" in shown.err
    )
    assert _main("init_student", *command, str(tmp_path / "new")) == 1
    assert "not empty" in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "text.jsonl").write_text('{"text": " "}\n')
    assert _main("init_student", *command, str(tmp_path / "none"), *text) == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith("text.jsonl: holds no text; give another")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--vocabulary-of t --layers 0",
        "--vocabulary-of t --hidden-size 8 --calibration-text {file}",
        "--vocabulary-of t --dense-ffn-hidden-size 8 --calibration-text {file}",
        "--hidden-size 8 --dense-ffn-hidden-size 8 --calibration-text {file}",
        "--hidden-size 8",
        "--dense-ffn-hidden-size 8",
        "--layers 0 --calibration-text {file}",
        "--vocabulary-of t --no-score --validation-text {file}",
    ],
)
def test_flags_of_a_student_that_exclude_each_other(
    words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("")
    given = words.format(file=tmp_path / "text").split()
    assert _main("init_student", "--from", "s", "--hf-out", str(tmp_path / "new"), *given) == 2
    assert "Error: " in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("tool", ["hf_to_mcore", "mcore_to_hf", "init_student"])
def test_help_and_usage_errors(tool: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(tool, "--help") == 0
    assert "examples:" in capsys.readouterr().out
    assert _main(tool) == 2
