"""The features of a teacher that the losses need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class TeacherFeatures:
    """Hidden states of one micro-batch, without gradient. Under sequence parallelism this rank's token shard.

    Attributes:
        final_SBT: after the final norm; None on a stage without the student's head.
        taps_SBT: outputs of the sampled layers by index of their pair, before the norm.
    """

    final_SBT: Tensor | None
    taps_SBT: Mapping[int, Tensor]
