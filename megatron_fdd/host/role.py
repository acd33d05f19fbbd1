"""The two models of a run, and how they differ in a check: words, flags, and whether the model is trained."""

from __future__ import annotations

from enum import Enum


class Role(Enum):
    """One of a run's two models."""

    STUDENT = "student"
    TEACHER = "teacher"

    @property
    def label(self) -> str:
        """The model as messages name it."""
        return f"the {self.value}"

    @property
    def is_trained(self) -> bool:
        """Whether the model has a backward pass and an optimizer; the other model is frozen."""
        return self is Role.STUDENT

    @property
    def experts_flag(self) -> str:
        """The flag that says over how many ranks the model's experts are spread."""
        if self is Role.STUDENT:
            return "--expert-model-parallel-size"
        return "--teacher-expert-model-parallel-size"

    @property
    def fp8_flag(self) -> str:
        """The flag that puts the model's layers into FP8."""
        return "--fp8-format" if self is Role.STUDENT else "--teacher-fp8-format"
