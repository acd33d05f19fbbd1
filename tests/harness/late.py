"""A stand-in for torch's `Work`, for collectives and sends that have done nothing before they are waited for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True)
class Late:
    """The handle of work that is done when it is waited for, once."""

    finish: Callable[[], None] | None

    def wait(self) -> None:
        assert self.finish is not None, "waited for twice"
        self.finish()
        self.finish = None
