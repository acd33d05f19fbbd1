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
FLAGS = (
    "--lr 0 --seq-length 48 --fdd-tokens all --fdd-ce-weight 0.5 --train-iters 1 "
    "--micro-batch-size 1 --global-batch-size 6 --eval-micro-batch-size 2 --eval-global-batch-size 8"
).split()
VALIDATION = "--full-validation --multiple-validation-sets --eval-interval 1".split()


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
    """Sets of 5 instructions and of 1, in steps of 8. The truth is a training step on all 6; weights never change."""
    five, one, every = (
        instructions(toy, tmp_path, name, numbers)
        for name, numbers in (("five", range(5)), ("one", range(5, 6)), ("every", range(6)))
    )

    def command(name: str) -> list[str]:
        places = ("--train-data-path", every, "--fdd-metrics-file", tmp_path / name / "metrics.jsonl")
        flags = toy.mock_command(*FLAGS, *VALIDATION, *places, "--valid-data-path", five, one)
        return [flag for flag in flags if flag != "--mock-data"]

    trained(command("dp1"), ranks=1)
    trained(command("dp2"))
    for name in ("dp1", "dp2"):
        truth, *validations = metrics(tmp_path / name)
        assert [record["iteration"] for record in validations] == [1, 1]
        for record in validations:
            for term in TERMS:
                assert record[f"valid {term}"] == pytest.approx(truth[term], rel=1e-5), (name, term)
    first, second = (metrics(tmp_path / name)[0]["total"] for name in ("dp1", "dp2"))
    assert first == pytest.approx(second, rel=1e-5)
