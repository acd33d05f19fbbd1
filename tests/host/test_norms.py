"""Norms of local modules against float64, and where Megatron uses them."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer import TransformerConfig, transformer_block
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from megatron_fdd.convert.mcore_model import build_model, complete_args
from megatron_fdd.convert.ranks import conversion_ranks
from megatron_fdd.host import rehearsal
from megatron_fdd.host.patches.norms import RMSNorm
from tests.harness.ranks import distributed

LLAMA = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "ffn_hidden_size": 64,
    "max_position_embeddings": 16,
    "seq_length": 16,
    "vocab_size": 50,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
}
H, EPS = 24, 1e-5
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2}


def _config(**settings: object) -> SimpleNamespace:
    defaults = {
        "layernorm_zero_centered_gamma": False,
        "sequence_parallel": False,
        "normalization": "RMSNorm",
    }
    return SimpleNamespace(**{**defaults, "params_dtype": torch.float32, **settings})


def _norm(**settings: object) -> torch.nn.Module:
    rehearsal.start()
    return WrappedTorchNorm(config=_config(**settings), hidden_size=H, eps=EPS)


def _reference(normalization: str, x_NH: Tensor, gain_H: Tensor, bias_H: Tensor) -> Tensor:
    if normalization == "RMSNorm":
        return x_NH / (x_NH.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * gain_H
    centred_NH = x_NH - x_NH.mean(-1, keepdim=True)
    return centred_NH / (centred_NH.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * gain_H + bias_H


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_value_and_gradient_equal_float64(
    normalization: str, zero_centered: bool, dtype: torch.dtype
) -> None:
    norm = _norm(normalization=normalization, layernorm_zero_centered_gamma=zero_centered, params_dtype=dtype)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x_NH = (3 * torch.randn(5, H) + 1).to(dtype).requires_grad_()
    inputs = [x_NH, *norm.parameters()]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    bias_H = exact[2] if len(exact) > 2 else torch.zeros(H)
    out_NH = norm(x_NH)
    expected_NH = _reference(normalization, exact[0], exact[1] + float(zero_centered), bias_H)
    out_NH.float().square().sum().backward()
    expected_NH.square().sum().backward()
    assert out_NH.dtype == dtype
    for ours, theirs in [
        (out_NH, expected_NH),
        *((a.grad, b.grad) for a, b in zip(inputs, exact, strict=True)),
    ]:
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() <= TOLERANCE[dtype] * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_llamas_to_the_last_bit(dtype: torch.dtype) -> None:
    norm, llama = _norm(params_dtype=dtype), LlamaRMSNorm(H, EPS).to(dtype)
    torch.nn.init.normal_(llama.weight)
    norm.load_state_dict(llama.state_dict())
    x_NH = torch.randn(7, H, dtype=dtype)
    assert torch.equal(norm(x_NH), llama(x_NH))


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("zero_centered", [False, True])
def test_a_new_norm_has_gain_one(normalization: str, zero_centered: bool) -> None:
    norm = _norm(normalization=normalization, layernorm_zero_centered_gamma=zero_centered)
    assert torch.equal(norm.gain, torch.ones(H))


def test_an_unknown_normalization_is_refused() -> None:
    with pytest.raises(
        ValueError, match="--normalization L2Norm: local modules have only RMSNorm, LayerNorm"
    ):
        _norm(normalization="L2Norm")


@pytest.mark.parametrize("sequence_parallel", [False, True])
@distributed(tp=2)
def test_every_norm_of_a_model_is_ours_and_marked(sequence_parallel: bool) -> None:
    config = TransformerConfig(
        num_layers=2,
        hidden_size=H,
        num_attention_heads=2,
        normalization="RMSNorm",
        layernorm_epsilon=3e-4,
        qk_layernorm=True,
        tensor_model_parallel_size=2,
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=True,
    )
    spec = get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm")
    model = GPTModel(config, spec, vocab_size=16, max_sequence_length=8)
    norms = [module for module in model.modules() if isinstance(module, RMSNorm)]
    assert len(norms) == 2 * 4 + 1  # two layers: input, query, key, MLP; and the final one
    assert len([name for name, _ in model.named_parameters() if "norm" in name]) == len(norms)
    for norm in norms:
        assert norm.eps == 3e-4
        assert norm.weight.sequence_parallel is sequence_parallel


class FusedLayerNorm:
    """apex's fused norm as Megatron sees it: not an RMSNorm."""

    def __init__(self, config: TransformerConfig, *_sizes: object, **_options: object) -> None:
        assert config.normalization == "LayerNorm"


@distributed(ranks=1)
def test_a_conversion_beside_apex_builds_rms_norms_and_leaves_no_trace() -> None:
    with patch.object(transformer_block, "LayerNormImpl", FusedLayerNorm):
        args = complete_args(LLAMA, dtype=torch.float32, vocabulary_divisor=8)
        with conversion_ranks() as groups:
            model = build_model(args, groups, "meta")
        assert isinstance(model.decoder.final_layernorm, RMSNorm)
        assert transformer_block.LayerNormImpl is FusedLayerNorm
