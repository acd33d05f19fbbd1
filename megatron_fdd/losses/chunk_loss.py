"""The settings of a step's losses, and what a micro-batch adds to them on one chunk of the student."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_fdd.losses.sampling import EVERYTHING, StepDraw


@dataclass(frozen=True, slots=True)
class StepSettings:
    """The settings that change from step to step.

    Attributes:
        inner: factor of the weights of inner layers' terms (warm-up, decay).
        term_per_label_token: global count of the tokens that all terms but the cross-entropy use, over that of the
            label tokens. Megatron divides every gradient by one number, the former.
        draw: what the terms of inner layers look at.
    """

    inner: float = 1.0
    term_per_label_token: float = 1.0
    draw: StepDraw = EVERYTHING


@dataclass(frozen=True, slots=True)
class ChunkLoss:
    """The part of the loss that a micro-batch adds on one chunk.

    Attributes:
        parts: weighted, float32 scalars over this rank's rows; their sum is what is back-propagated.
        sums: unweighted and detached, by the name of the part, for the log.
    """

    parts: tuple[Tensor, ...] = ()
    sums: Mapping[str, Tensor] = field(default_factory=dict)

    def __add__(self, other: ChunkLoss) -> ChunkLoss:
        return ChunkLoss(self.parts + other.parts, {**self.sums, **other.sums})

    @property
    def total(self) -> Tensor | None:
        """The loss, float32; None without a term."""
        return torch.stack(self.parts).sum() if self.parts else None
