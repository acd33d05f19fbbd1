"""One line of the doctor's report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check has found.

    Attributes:
        level: FAIL where a run would not start or not be right, warn where it might not.
        name: what was looked at.
        remedy: what to do about it; empty where there is nothing to do.
    """

    level: Level
    name: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.level:<4}  {self.name}: {self.text}" + (f"; {self.remedy}" if self.remedy else "")


def first_line(error: BaseException) -> str:
    """Type and message of an error, short enough for a report."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
