"""Round trips HF -> Megatron -> HF on live ranks, with one layout for import and export: logits, bytes, configs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from megatron_fdd import convert
from tests.convert import mcore, toys
from tests.harness.ranks import distributed


def _check(tmp_path: Path, variant: str, vocabulary_divisor: int = 128) -> None:
    source, saved, back = tmp_path / "source", tmp_path / "mcore", tmp_path / "back"
    if dist.get_rank() == 0:
        toys.make_llama(source, variant)
    dist.barrier()
    convert.hf_to_mcore(source, saved, vocabulary_divisor=vocabulary_divisor)
    model, args = mcore.from_own_args(saved)
    expected = toys.hf_logits(source, toys.TOKENS)
    got = mcore.logits(model.float(), toys.TOKENS)
    assert got.shape[-1] == args.padded_vocab_size > 99
    assert got[..., 99:].abs().max() == 0.0
    assert expected.std() > 0.3
    assert (got[..., :99] - expected).abs().max() < toys.LOGIT_TOLERANCE
    exported = convert.mcore_to_hf(saved, back)
    tensors = len(toys.tensor_hashes(source))
    assert (exported.num_tensors, exported.unchanged) == (tensors, tensors)
    assert toys.tensor_hashes(back) == toys.tensor_hashes(source)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (back / name).read_bytes() == (source / name).read_bytes(), name


@pytest.mark.parametrize("variant", list(toys.VARIANTS))
@distributed(tp=1)
def test_one_rank(tmp_path: Path, variant: str) -> None:
    _check(tmp_path, variant)


@distributed(tp=1)
def test_a_bias_that_transformers_rounded(tmp_path: Path) -> None:
    """An export has it in float32, with the same values."""
    source, saved, back = tmp_path / "source", tmp_path / "mcore", tmp_path / "back"
    toys.make_llama(source, "minimax_m2")
    [file] = source.glob("*.safetensors")
    tensors = load_file(file)
    biases = {name: b.bfloat16() for name, b in tensors.items() if name.endswith("correction_bias")}
    save_file(tensors | biases, file, {"format": "pt"})
    convert.hf_to_mcore(source, saved)
    assert convert.mcore_to_hf(saved, back).unchanged == len(tensors)
    exported = load_file(back / "model.safetensors")
    for name, bias in biases.items():
        assert torch.equal(exported[name], bias.float())
        assert exported[name].dtype == torch.float32


TWO_RANKS = [
    "plain",
    "olmo2",
    "gemma2",
    "gemma3_text",
    "tied",
    "biases",
    "attention_bias",
    "mistral_window",
    "qwen2",
    "qwen3",
    *("seed_oss", "smollm3", "ernie4_5", "phi3", "nemotron", "starcoder2"),
    *(variant for variant in toys.MIXTURES if variant != "gpt_oss"),
]


@pytest.mark.parametrize("variant", TWO_RANKS)
@distributed(tp=2)
def test_two_ranks(tmp_path: Path, variant: str) -> None:
    _check(tmp_path, variant)


@pytest.mark.tier("all")
@pytest.mark.parametrize("variant", list(toys.VARIANTS))
@distributed(pp=2)
def test_two_stages(tmp_path: Path, variant: str) -> None:
    mcore.make_checkpoint(tmp_path, variant)
    got = mcore.logits_of_stages(tmp_path / "mcore", toys.TOKENS)
    if got is not None:
        expected = toys.hf_logits(tmp_path / "source", toys.TOKENS)
        assert expected.std() > 0.3
        assert (got[..., :99] - expected).abs().max() < toys.LOGIT_TOLERANCE


@pytest.mark.parametrize("variant", toys.MIXTURES)
@distributed(dp=2, ep=2)
def test_experts_on_two_ranks(tmp_path: Path, variant: str) -> None:
    _check(tmp_path, variant)


@distributed(tp=2, ep=2, etp=1)
def test_experts_with_biases_are_whole_on_a_rank(tmp_path: Path) -> None:
    _check(tmp_path, "gpt_oss")


@pytest.mark.tier("all")
@pytest.mark.parametrize("variant", ["qwen3_moe", "qwen3_moe_mixed", "glm4_moe"])
@distributed(tp=2, dp=2, ep=2)
def test_experts_and_tensors_on_four_ranks(tmp_path: Path, variant: str) -> None:
    _check(tmp_path, variant)


@pytest.mark.parametrize("variant", ["llama3", "bfloat16"])
@distributed(tp=3)
def test_three_ranks(tmp_path: Path, variant: str) -> None:
    _check(tmp_path, variant, vocabulary_divisor=129)
