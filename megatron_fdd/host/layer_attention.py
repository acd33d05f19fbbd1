"""Attention that Megatron's own lacks, beside that of `layer_parts`, for families that bring a specification.

It works with Megatron's local modules, and where a class does not say otherwise with TransformerEngine's. It has never
run on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_fdd.host.layer_parts import NormOverHeadsAttention, WindowRotaryAttention


class NormBehindRotationAttention(SelfAttention):
    """Self-attention that normalises queries and keys, per head, after their rotation.

    The norms are `rotated_q_layernorm` and `rotated_k_layernorm`: Megatron sums gradients by these endings.
    """

    def __init__(self, config: TransformerConfig, *arguments: Any, **keywords: Any) -> None:
        super().__init__(config, *arguments, **keywords)
        self.rotated_q_layernorm = self.get_submodule("q_layernorm")
        self.rotated_k_layernorm = self.get_submodule("k_layernorm")
        self.q_layernorm = self.k_layernorm = None
        self.core_attention.register_forward_pre_hook(self._normed)

    def _normed(self, _module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        query, key, *others = inputs
        return self.rotated_q_layernorm(query), self.rotated_k_layernorm(key), *others


class WindowRotaryNormAttention(WindowRotaryAttention, NormOverHeadsAttention):
    """Both together: norms over all heads, and on layers with a window angles of their own, without YaRN."""


class CappedScoresAttention(SelfAttention):
    """Self-attention with a soft cap of its scores, `config.attention_score_cap`, before the mask; local modules only.

    The cap c makes c tanh(score / c) of a scaled score, in float32.
    """

    def __init__(self, config: TransformerConfig, *arguments: Any, **keywords: Any) -> None:
        super().__init__(config, *arguments, **keywords)
        self._cap: float = config.attention_score_cap
        self.core_attention.scale_mask_softmax.register_forward_pre_hook(self._capped)

    def _capped(self, _module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        scores: Tensor = inputs[0]
        capped = self._cap * torch.tanh(scores.float() / self._cap)
        return capped.to(scores.dtype), *inputs[1:]
