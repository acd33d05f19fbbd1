"""The lens reads a final norm as its owner applies it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

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
