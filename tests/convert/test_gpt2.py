"""GPT-2: logits, bytes, both ways of naming tensors, and what a config may not say."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_fdd import convert
from megatron_fdd.convert.families import family_of
from megatron_fdd.convert.gpt2 import GPT2
from megatron_fdd.convert.transforms import FusedQkv, GroupedQkv
from tests.convert import mcore, toy_gpt2, toys
from tests.ranks import Layout, run_on_ranks

CARRIED = ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja")


def _there_and_back(source: Path, saved: Path, back: Path) -> None:
    convert.hf_to_mcore(source, saved)
    convert.mcore_to_hf(saved, back)


def _check_logits(source: Path, saved: Path) -> None:
    model, args = mcore.from_own_args(saved, padded_vocab_size=256)
    expected = toys.hf_logits(source, toys.TOKENS)
    got = mcore.logits(model.float(), toys.TOKENS)
    assert expected.std() > 0.3
    assert (got[..., :99] - expected).abs().max() < toys.LOGIT_TOLERANCE * 10
    assert args.position_embedding_type == "learned_absolute"


def _convert(tmp_path: Path) -> dict[str, Path]:
    folders = {name: tmp_path / name for name in ("source", "saved", "back")}
    run_on_ranks(_there_and_back, Layout(tp=1), folders)
    return folders


def _check_carried(source: Path, back: Path) -> None:
    for name in CARRIED:
        assert (back / name).read_bytes() == (source / name).read_bytes(), name


@pytest.mark.parametrize("variant", list(toy_gpt2.VARIANTS))
def test_there_and_back(tmp_path: Path, variant: str) -> None:
    toy_gpt2.make_gpt2(tmp_path / "source", variant)
    folders = _convert(tmp_path)
    assert toys.tensor_hashes(folders["back"]) == toys.tensor_hashes(folders["source"])
    _check_carried(folders["source"], folders["back"])
    for ranks in (1, 2):
        arguments = {"source": folders["source"], "saved": folders["saved"]}
        run_on_ranks(_check_logits, Layout(tp=ranks), arguments)
