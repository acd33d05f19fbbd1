"""How far a piece of work is: a bar on a terminal; elsewhere, in a pipe or a file, a line now and then."""

from __future__ import annotations

import time
from typing import Any

from tqdm import tqdm

from megatron_fdd.host import console
from megatron_fdd.host.disk import sized

# Seconds between two lines.
_EVERY_S = 60.0


class Bar(tqdm):
    """A bar of tqdm's on stderr, with its flags; where stderr is no terminal a line a minute takes its place.

    Args:
        total: of units, or of bytes where the unit is "B".
        is_shown: false on ranks that show nothing.
    """

    def __init__(self, *, total: int, desc: str, unit: str, is_shown: bool = True, **flags: Any) -> None:
        super().__init__(
            total=total,
            desc=desc,
            unit=unit,
            unit_scale=unit == "B",
            file=console.terminal(),
            disable=None if is_shown else True,
            **flags,
        )
        self._has_lines = is_shown and self.disable
        self._desc, self._unit = desc, unit
        self._first, self._begun_s = self.n, time.monotonic()
        self._told_s = self._begun_s

    def update(self, n: float | None = 1) -> bool | None:
        """Note that n more units are done."""
        if not self._has_lines:
            return super().update(n)
        self.n += n or 0
        now = time.monotonic()
        if now - self._told_s >= _EVERY_S:
            self._told_s = now
            left_s = (self.total - self.n) * (now - self._begun_s) / max(self.n - self._first, 1e-9)
            console.complain(
                f"{self._desc}: {self._shown(self.n)} of {self._shown(self.total)}, {hours(left_s)} left"
            )
        return None

    def _shown(self, count: float) -> str:
        return sized(count) if self._unit == "B" else f"{count} {self._unit}s"


def hours(seconds: float) -> str:
    """Write a duration in the unit that suits it."""
    if seconds < 100:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 6000 else f"about {seconds / 3600:.1f} h"
