"""A run of models for text and images trains the student's text part, and an export has the rest as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_fdd import convert
from tests.convert import toys
from tests.convert.multimodal_toys import make_multimodal, multimodal_config, multimodal_logits
from tests.entry.command import trained
from tests.entry.conftest import Toys
from tests.harness.ranks import Layout, run_on_ranks

pytestmark = pytest.mark.tier("default")


def _make_models(root: Path) -> None:
    for role, name in (("teacher", "mistral3 of ministral3"), ("student", "gemma3")):
        text = multimodal_config(name)["text_config"]
        # There are four layers, so that two stages can share them.
        make_multimodal(root / f"{role}-hf", name, text_config={**text, "num_hidden_layers": 4})
        convert.hf_to_mcore(root / f"{role}-hf", root / role)


def _export(root: Path) -> None:
    convert.mcore_to_hf(root / "run", root / "back")


def test_a_trained_text_part(toy: Toys, tmp_path: Path) -> None:
    run_on_ranks(_make_models, Layout(ranks=1), {"root": tmp_path})
    start = ("--pretrained-checkpoint", tmp_path / "student", "--teacher-load", tmp_path / "teacher")
    kept = ("--load", tmp_path / "run", "--save", tmp_path / "run", "--save-interval", 2)
    trained(toy.command(*start, *kept, "--train-iters", 2, "--pipeline-model-parallel-size", 2), ranks=2)
    run_on_ranks(_export, Layout(ranks=1), {"root": tmp_path})
    source, back = tmp_path / "student-hf", tmp_path / "back"
    before, after = toys.tensor_hashes(source), toys.tensor_hashes(back)
    assert after.keys() == before.keys()
    same = {name for name in after if after[name] == before[name]}
    assert same == {name for name in before if not name.startswith("language_model.")}
    for file in ("config.json", "preprocessor_config.json"):
        assert (back / file).read_bytes() == (source / file).read_bytes()
    assert multimodal_logits(back, toys.TOKENS).isfinite().all()
