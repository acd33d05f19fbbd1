"""Packed sequences through the real entry point."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_fdd.data.encode import EncodeSettings
from megatron_fdd.data.prepare import PrepareSettings, prepare
from megatron_fdd.data.tokenizer import TokenizerSettings
from tests.data.conftest import write_jsonl
from tests.entry.checks import assert_close, metrics
from tests.entry.command import trained
from tests.entry.conftest import Toys, write_text

PACKED = "--dataloader-inter-document-masking"
PIPELINE = "--pipeline-model-parallel-size 2"


@pytest.fixture(scope="module")
def with_ends(toy: Toys, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepare short documents with an end-of-document token after each."""
    folder = tmp_path_factory.mktemp("packed")
    write_text(folder / "text.txt")
    tokenizer = TokenizerSettings("HuggingFaceTokenizer", str(toy.tokenizer))
    encode = EncodeSettings(tokenizer, "text", append_eod=True)
    prepare(
        PrepareSettings((str(folder / "text.txt"),), str(folder / "text"), encode, separator="blank-line")
    )
    return folder / "text"


def test_documents_do_not_see_each_other(toy: Toys, with_ends: Path, tmp_path: Path) -> None:
    """Megatron's attention mask, cut after every end of a document, is another way to do the same."""
    data = ("--data-path", str(with_ends), "--seq-length", "48")
    masked, packed, staged, mixed = (tmp_path / name for name in ("masked", "packed", "staged", "mixed"))
    trained(
        toy.saving_command(masked, *data, "--reset-attention-mask", "--reset-position-ids"),
        toy.saving_command(packed, *data, PACKED),
        toy.saving_command(staged, *data, PACKED, *PIPELINE.split()),
        toy.saving_command(mixed, *data),
    )
    assert_close(packed, masked, 3)
    assert_close(staged, masked, 3)
    assert metrics(mixed)[0]["total"] != pytest.approx(metrics(masked)[0]["total"], rel=1e-4)


def test_instructions_share_samples(toy: Toys, tmp_path: Path) -> None:
    """The same instructions, one for each sample or packed, have the same losses per token."""
    rows = [{"prompt": "a student follows", "response": "its teacher"} for _ in range(40)]
    path = write_jsonl(tmp_path / "instruction.jsonl", rows)
    tokenizer = TokenizerSettings("HuggingFaceTokenizer", str(toy.tokenizer))
    encode = EncodeSettings(tokenizer, "instruction", seq_length=48)
    prepare(PrepareSettings((path,), str(tmp_path / "instruction"), encode))
    data = ("--data-path", str(tmp_path / "instruction"), "--split", "80,20,0", "--seq-length", "48")
    single, packed, staged = (tmp_path / name for name in ("single", "packed", "staged"))
    once = (*data, "--train-iters", "1")
    trained(
        toy.saving_command(single, *once),
        toy.saving_command(packed, *once, PACKED),
        toy.saving_command(staged, *once, PACKED, *PIPELINE.split()),
    )
    ([one], [many], [two_stages]) = (metrics(folder) for folder in (single, packed, staged))
    assert many["tokens"] > 2 * one["tokens"]
    names = [name for name in one if name not in ("tokens", "grad_norm")]
    assert [many[name] for name in names] == pytest.approx([one[name] for name in names], rel=1e-5, abs=1e-6)
    assert two_stages == pytest.approx(many, rel=1e-5, abs=1e-6)
