"""A layer of experts in plain float64, and the loss that balances its router; part of tests/oracle/reference.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def mlp_prefixes(num_experts: int | None, layer: str) -> list[str]:
    """Return the prefixes of a layer's feed-forward matrices: one, or one for each expert."""
    if num_experts is None:
        return [layer + "mlp."]
    return [f"{layer}mlp.experts.local_experts.{expert}." for expert in range(num_experts)]


def feed_forward(weights: dict[str, Tensor], prefix: str, h: Tensor) -> Tensor:
    gate, up = F.linear(h, weights[prefix + "linear_fc1.weight"]).chunk(2, -1)
    return F.linear(F.silu(gate) * up, weights[prefix + "linear_fc2.weight"])


def routing(logits: Tensor, topk: int) -> Tensor:
    """Compute Megatron's default routing: a softmax over the chosen experts' logits; 0 for the others."""
    values, experts = logits.topk(topk, -1)
    return torch.zeros_like(logits).scatter(-1, experts, values.softmax(-1))


def balancing_loss(probabilities: list[Tensor], topk: int, micro_batch: int) -> Tensor:
    """Compute Switch Transformer's loss, a sum over layers and micro-batches, times the tokens of a micro-batch.

    With that factor, Megatron's division by the step's tokens gives a mean over micro-batches.
    """
    total = torch.zeros((), dtype=torch.float64)
    for p_BSE in probabilities:
        for part in p_BSE.split(micro_batch):
            p = part.flatten(0, 1)
            chosen = (routing(p, topk) > 0).double()
            total = total + p.shape[-1] * (p.mean(0) * chosen.mean(0) / topk).sum() * len(p)
    return total
