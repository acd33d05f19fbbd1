"""A router that Megatron's own is not, for families that bring a specification.

It has never run on a GPU. Shapes: N tokens of this rank, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class SoftmaxBiasRouter(TopKRouter):
    """A router whose scores are a softmax, to which a bias is added for the choice alone; Megatron has it for sigmoids.

    The weights of a token's experts are their scores, divided by their sum. `expert_bias` is a constant, in float32.
    """

    def __init__(self, config: TransformerConfig, *arguments: Any, **keywords: Any) -> None:
        super().__init__(config, *arguments, **keywords)
        del self.expert_bias  # None, an attribute that is no buffer
        zeros_E = torch.zeros(config.num_moe_experts, dtype=torch.float32, device=torch.cuda.current_device())
        self.register_buffer("expert_bias", zeros_E)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the weights [N, E], 0 where an expert is not chosen, and the choice [N, E], for logits [..., E].

        Args:
            padding_mask: unused; it concerns losses that the family refuses.
        """
        logits_NE = logits.view(-1, logits.shape[-1])
        scores_NE = logits_NE.softmax(-1, dtype=torch.float32)
        chosen_NK = torch.topk(scores_NE + self.expert_bias, self.topk).indices
        chosen_NE = torch.zeros_like(scores_NE, dtype=torch.bool).scatter(1, chosen_NK, True)
        weights_NE = scores_NE * chosen_NE
        return (weights_NE / weights_NE.sum(-1, keepdim=True)).type_as(logits), chosen_NE


def use_softmax_bias(layer: ModuleSpec) -> None:
    """Give a layer with experts this router; a dense layer is left as it is."""
    parts = layer.submodules.mlp.keywords["submodules"]
    if isinstance(parts, MoESubmodules):
        parts.router = SoftmaxBiasRouter
