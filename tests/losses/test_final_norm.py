"""The lens reads a final norm as its owner applies it, and gives features in float32."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_fdd.losses.lens import FinalNorm, Lens, LensKind, TeacherLens
from megatron_fdd.step.lens import read_final_norm


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_weights_around_zero_are_read_as_weights_around_one(centred: bool, kind: str) -> None:
    norm = torch.nn.LayerNorm(3)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.1, -0.2, 0.3]))
    config = SimpleNamespace(
        layernorm_zero_centered_gamma=centred, normalization=kind, layernorm_epsilon=1e-5
    )
    model: Any = SimpleNamespace(config=config, decoder=SimpleNamespace(final_layernorm=norm))
    found = read_final_norm(model)
    expected = torch.tensor([0.1, -0.2, 0.3]) + (1 if centred else 0)
    assert torch.equal(found.weight_H, expected)
    assert (found.bias_H is norm.bias) == (kind == "LayerNorm")


@pytest.mark.parametrize("kind", [None, "RMSNorm", "LayerNorm"])
def test_features_of_a_model_in_bf16_are_as_exact_as_float32(kind: str | None) -> None:
    weight_H, hidden_SBH = torch.randn(2, 8).bfloat16()[0], torch.randn(3, 2, 8).bfloat16()
    bias_H = torch.randn(8).bfloat16() if kind == "LayerNorm" else None
    norm = None if kind is None else FinalNorm(weight_H, bias_H, 1e-5, "rms" if bias_H is None else "layer")
    found_NH = Lens(torch.zeros(4, 8), norm).features(hidden_SBH)
    expected_NH = hidden_SBH.flatten(0, 1).double()
    if kind is not None:
        expected_NH = expected_NH - (0 if bias_H is None else expected_NH.mean(1, keepdim=True))
        expected_NH = (
            expected_NH * (expected_NH.square().mean(1, keepdim=True) + 1e-5).rsqrt() * weight_H.double()
        )
        expected_NH = expected_NH + (0 if bias_H is None else bias_H.double())
    assert found_NH.dtype == torch.float32
    torch.testing.assert_close(found_NH.double(), expected_NH, rtol=1e-6, atol=1e-6)


def test_features_of_a_learned_lens_are_float32() -> None:
    kind = LensKind(
        {"scale": "T"}, lambda hidden, tensors, norm: (norm(hidden) * tensors["scale"]).bfloat16()
    )
    lens = TeacherLens(Lens(torch.zeros(4, 8), None), kind, {2: {"scale": torch.ones(8)}})
    assert lens.features(torch.randn(3, 2, 8), 2).dtype == torch.float32
