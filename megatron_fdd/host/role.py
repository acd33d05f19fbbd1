"""The two models of a run, and what differs between them for a check: words, flags, whether it is trained."""

from __future__ import annotations

from enum import Enum


class Role(Enum):
    """Which of a run's two models is meant."""

    STUDENT = "student"
    TEACHER = "teacher"

    @property
    def label(self) -> str:
        """The model as messages name it."""
        return f"the {self.value}"

    @property
    def is_trained(self) -> bool:
        """Whether it has a backward pass and an optimizer; the other one is frozen."""
        return self is Role.STUDENT

    @property
    def experts_flag(self) -> str:
        """The flag over how many ranks its experts are spread."""
        if self is Role.STUDENT:
            return "--expert-model-parallel-size"
        return "--fdd-teacher-expert-model-parallel-size"

    @property
    def fp8_flag(self) -> str:
        """The flag that puts its layers into FP8."""
        return "--fp8-format" if self is Role.STUDENT else "--teacher-fp8-format"
