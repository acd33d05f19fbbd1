"""The interface of a teacher, which gives its features at the sampled layers for each micro-batch."""

from __future__ import annotations

from typing import Protocol

from megatron_fdd.data.batch import Batch
from megatron_fdd.losses.features import TeacherFeatures


class Teacher(Protocol):
    """A source of the features of each micro-batch of a step, by the micro-batch's index."""

    def features(self, index: int, batch: Batch) -> TeacherFeatures:
        """Return the features of micro-batch `index` of this step."""
