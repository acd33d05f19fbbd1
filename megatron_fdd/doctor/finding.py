"""One line of the doctor's report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of a check.

    Attributes:
        level: FAIL if a run would not start or would be wrong, warn if it might.
        name: what was checked.
        text: what was found.
        remedy: what to do about it; empty if there is nothing to do.
    """

    level: Level
    name: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.level:<4}  {self.name}: {self.text}" + (f"; {self.remedy}" if self.remedy else "")


def first_line(error: BaseException) -> str:
    """Return type and message of an error, short enough for a report."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
