"""The logit lens: a model's own final norm and language-model head, applied to any hidden state.

Shape letters: S sequence (this rank's part), B micro-batch, N = S*B token rows, H hidden,
W this rank's slice of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class FinalNorm:
    """A functional copy of a model's final norm. Statistics and result are float32.

    Attributes:
        weight_H: scale, already shifted by 1 where the model stores it zero-centred.
        bias_H: None where there is none.
        kind: "rms" keeps the mean, "layer" takes it away.
    """

    weight_H: Tensor
    bias_H: Tensor | None
    epsilon: float
    kind: Literal["rms", "layer"]

    def __call__(self, hidden_NH: Tensor) -> Tensor:
        hidden_NH = hidden_NH.float()
        width = hidden_NH.shape[-1:]
        weight_H, bias_H = self.weight_H.float(), None if self.bias_H is None else self.bias_H.float()
        if self.kind == "layer":
            return torch.nn.functional.layer_norm(hidden_NH, width, weight_H, bias_H, self.epsilon)
        normed_NH = torch.nn.functional.rms_norm(hidden_NH, width, weight_H, self.epsilon)
        return normed_NH if bias_H is None else normed_NH + bias_H


@dataclass(frozen=True, slots=True)
class Lens:
    """The map from a hidden state to the vocabulary: z = head_WH N(h), or z = head_WH h without a norm.

    The head stays sharded over the vocabulary; no logits are formed here (ops/linear_kl.py does it in tiles).
    """

    head_WH: Tensor
    norm: FinalNorm | None

    def features(self, hidden_SBH: Tensor) -> Tensor:
        """Return the normed features of every token row, float32 [N, H]."""
        return self.normed(hidden_SBH.flatten(0, 1))

    def normed(self, hidden_NH: Tensor) -> Tensor:
        """Return the normed features of rows [N, H], in float32."""
        return hidden_NH.float() if self.norm is None else self.norm(hidden_NH)
