"""The heads' Gram matrices, made once a step for all chunks of a stage."""

from __future__ import annotations

from megatron_fdd.config import FddConfig
from megatron_fdd.ops.delta import HeadGrams, head_grams
from megatron_fdd.ops.heads import Heads


class StepGrams:
    """The heads' Gram matrices of the current step, for all chunks of a stage."""

    def __init__(self, config: FddConfig) -> None:
        self._config = config
        self._grams: HeadGrams | None = None
        self._are_fresh = False

    def begin_step(self) -> None:
        """Forget that they are fresh: the student's head may have changed since the last step."""
        self._are_fresh = False

    def current(self, heads: Heads) -> HeadGrams:
        """Return the matrices of the heads as they are in this step; with a live head each call has its own graph.

        Collectives over the tensor-parallel group: those of `head_grams`, once a step; with a live head at every call.
        """
        if self._are_fresh and self._config.lens_head == "detached":
            assert self._grams is not None
            return self._grams
        self._grams = head_grams(heads, previous=self._grams)
        self._are_fresh = True
        return self._grams
