"""An export writes the same text as the Megatron student that it was made of, word by word the likeliest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_fdd import convert
from tests.convert import mcore, toys
from tests.harness.ranks import distributed

pytestmark = pytest.mark.tier("all")

PROMPT, NEW = toys.TOKENS[:, :9], 24


def _megatrons(model: torch.nn.Module) -> torch.Tensor:
    tokens = PROMPT
    for _ in range(NEW):
        best = mcore.logits(model, tokens)[:, -1, : toys.SHAPE["vocab_size"]].argmax(-1)
        tokens = torch.cat([tokens, best[:, None]], 1)
    return tokens


def _transformers(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.generation_config.eos_token_id = None  # no end before the last word
    written = model.generate(
        PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=NEW, do_sample=False
    )
    assert isinstance(written, torch.Tensor)
    return written


@pytest.mark.parametrize("variant", toys.VARIANTS)
@distributed(tp=1)
def test_the_same_greedy_text(tmp_path: Path, variant: str) -> None:
    mcore.make_checkpoint(tmp_path, variant)
    load = tmp_path / "mcore"
    model, args = mcore.from_own_args(load)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # as a training would: other weights than those imported
        for parameter in model.parameters():
            parameter.mul_(1 + 0.5 * torch.randn(parameter.shape, generator=generator))
    mcore.save(tmp_path / "trained", model, args)
    given = {"hf_config": load / "hf", "tokenizer": load / "tokenizer"}
    convert.mcore_to_hf(tmp_path / "trained", tmp_path / "out", **given)
    written = _transformers(tmp_path / "out")
    # Not one word again and again; these toys soon say one.
    least = 2 if variant in ("gemma2", "gemma3_text", "starcoder2") else 6
    assert len(written[:, PROMPT.shape[1] :].unique()) >= least
    assert written.tolist() == _megatrons(model.float()).tolist()
    assert written.tolist() != _transformers(tmp_path / "source").tolist()
