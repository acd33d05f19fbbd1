"""TransformerEngine's modules, compared with torch's: does the installed library compute here at all?"""

from __future__ import annotations

import pytest
import torch

te = pytest.importorskip("transformer_engine.pytorch")


def test_norm_and_linear() -> None:
    torch.manual_seed(0)
    fused = te.LayerNormLinear(256, 384, params_dtype=torch.bfloat16, device="cuda")
    hidden = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    output = fused(hidden)
    upstream = torch.randn_like(output)
    output.backward(upstream)
    wide = hidden.detach().double().requires_grad_()
    weight = fused.weight.detach().double().requires_grad_()
    normed = torch.nn.functional.layer_norm(
        wide, (256,), fused.layer_norm_weight.double(), fused.layer_norm_bias.double(), fused.eps
    )
    wanted = torch.nn.functional.linear(normed, weight, fused.bias.double())
    wanted.backward(upstream.double())
    for ours, reference in (
        (output, wanted),
        (hidden.grad, wide.grad),
        (fused.weight.grad, weight.grad),
    ):
        assert ((ours.double() - reference).norm() / reference.norm()).item() < 1e-2
