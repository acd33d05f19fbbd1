"""Full validation through the real entry point: a figure of weights and sets alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_fdd.data.encode import EncodeSettings
from megatron_fdd.data.prepare import PrepareSettings, prepare
from megatron_fdd.data.tokenizer import TokenizerSettings
from tests.data.conftest import write_jsonl
from tests.entry.checks import metrics
from tests.entry.command import trained
from tests.entry.conftest import Toys

WORDS = "the quick brown fox jumps over a lazy dog".split()
TERMS = ("total", "ce", "kd", "trajectory", "delta")
FLAGS = "--lr 0 --seq-length 48 --fdd-tokens all --fdd-ce-weight 0.5".split()
WHOLE_STEP = "--micro-batch-size 1 --global-batch-size 6 --train-iters 1".split()
VALIDATION = "--full-validation --multiple-validation-sets --eval-interval 1 --train-iters 2".split()


def instructions(toy: Toys, folder: Path, name: str, numbers: range) -> str:
    """Prepare instructions that differ in length; return their prefix."""
    rows = [{"prompt": " ".join(WORDS[: 1 + n]), "response": " ".join(WORDS[n : 3 + 2 * n])} for n in numbers]
    encode = EncodeSettings(
        TokenizerSettings("HuggingFaceTokenizer", str(toy.tokenizer)), "instruction", seq_length=48
    )
    path = write_jsonl(folder / f"{name}.jsonl", rows)
    prepare(PrepareSettings((path,), str(folder / name), encode))
    return str(folder / name)


def test_a_figure_of_weights_and_sets_alone(toy: Toys, tmp_path: Path) -> None:
    """Sets of 5 instructions and of 1, in steps of 8; the truth is a training step on all 6. Weights never change."""
    five, one, every = (
        instructions(toy, tmp_path, name, numbers)
        for name, numbers in (("five", range(5)), ("one", range(5, 6)), ("every", range(6)))
    )

    def command(name: str, *more: str) -> list[str]:
        places = ("--train-data-path", every, "--fdd-metrics-file", tmp_path / name / "metrics.jsonl")
        return [flag for flag in toy.mock_command(*FLAGS, *places, *more) if flag != "--mock-data"]

    def validating(name: str, *more: str) -> list[str]:
        return command(name, *VALIDATION, "--valid-data-path", five, one, *more)

    trained(command("truth", *WHOLE_STEP), validating("dp1"), ranks=1)
    trained(validating("dp2"), validating("pp2", "--pipeline-model-parallel-size", "2"))
    [wanted] = metrics(tmp_path / "truth")
    for name in ("dp1", "dp2", "pp2"):
        records = [record for record in metrics(tmp_path / name) if "valid total" in record]
        assert [record["iteration"] for record in records] == [1, 2, 2]
        for record in records:
            for term in TERMS:
                assert record[f"valid {term}"] == pytest.approx(wanted[term], rel=1e-5), (name, term)
