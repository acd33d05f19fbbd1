"""The teacher: something that gives, for each micro-batch, its features at the sampled layers."""

from __future__ import annotations

from typing import Protocol

from megatron_fdd.data.batch import Batch
from megatron_fdd.losses.features import TeacherFeatures


class Teacher(Protocol):
    """Gives the features of each micro-batch of a step, by its index."""

    def features(self, index: int, batch: Batch) -> TeacherFeatures: ...
