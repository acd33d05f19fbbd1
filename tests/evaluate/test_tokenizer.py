"""The tokenizer that a model is evaluated with gives the ids that its tokenizer.json says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_fdd.data.tokenizer_identity import identity_of_folder
from megatron_fdd.evaluate.evaluation import TextWindows, check_known_tokens
from megatron_fdd.evaluate.models import NamedModel
from tests.data.tokenizer_identity import variants


def model(folder: Path, content: variants.Content | None = None) -> NamedModel:
    """Make as much of a model as its tokenizer needs."""
    variants.write(folder, content)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    return NamedModel(folder.name, folder)


def test_the_file_is_read_where_the_class_does_something_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = model(tmp_path / "own")
    encode = identity_of_folder(own.folder).encode
    assert encode is not None
    text = "12345 years, 678 'REALLY"
    assert own.tokenizer()(text)["input_ids"] == encode(text)
    assert own.tokenizer().eos_token == "<|end|>"
    said = capsys.readouterr().err
    assert 'own: tokenizer.json is loaded directly, because the probe line "digits" gets other ids' in said
    assert said.count("is loaded directly") == 1
    variants.write(own.folder, variants.variant(variants.with_pattern(variants.ONE_DIGIT)))
    assert own.tokenizer()(text)["input_ids"] != encode(text)  # the ids follow the changed files
    assert NamedModel("none", tmp_path).identity() is None


def test_a_text_with_a_token_of_the_teacher_alone_is_refused(tmp_path: Path) -> None:
    teacher = model(tmp_path / "teacher", variants.variant(variants.add_added))
    student = model(tmp_path / "student")
    tokenizer = teacher.tokenizer()
    ids = tokenizer("two <|im_end|> three")["input_ids"]
    check_known_tokens(student, TextWindows(tokenizer, torch.tensor([ids])))
    ids = tokenizer("two <|new|> three")["input_ids"]
    with pytest.raises(
        ValueError, match=r"holds '<.new.>', id \d+ of the teacher, which student does not have; leave"
    ):
        check_known_tokens(student, TextWindows(tokenizer, torch.tensor([ids])))
