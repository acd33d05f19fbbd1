"""How far a producer is, and how long the rest takes: a bar on a terminal, lines in a log."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from megatron_fdd.data.store.whole_file import unfinished
from megatron_fdd.host import console
from megatron_fdd.host.bar import hours
from megatron_fdd.host.json_file import read_json

RATE_FILE = "rate.json"
# Seconds between two lines.
_EVERY_S = 300.0


class TeachProgress:
    """The tokens that a producer has computed, all replicas together; silent on all ranks but the first.

    The first round of batches also warms up, so that it does not count for the rate.

    Args:
        total: tokens that are to be computed.
        clock: seconds of a clock that never goes back.
    """

    def __init__(
        self,
        total: int,
        *,
        is_shown: bool,
        clock: Callable[[], float] = time.monotonic,
        say: Callable[[str], None] = console.say,
    ) -> None:
        self._total, self._done = total, 0
        self._is_shown, self._clock, self._say = is_shown, clock, say
        self._first: tuple[int, float] | None = None
        self._told_s: float | None = None
        self._bar = tqdm(
            total=total,
            unit="token",
            unit_scale=True,
            desc="teach",
            file=console.terminal(),
            disable=None if is_shown else True,
        )

    def __enter__(self) -> TeachProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    @property
    def tokens_per_s(self) -> float | None:
        """The rate since the first round; None before the second."""
        if self._first is None or self._done == self._first[0]:
            return None
        return (self._done - self._first[0]) / max(self._clock() - self._first[1], 1e-9)

    def round(self, tokens: int) -> None:
        """Note that each replica has run a batch, of so many tokens together."""
        self._done += tokens
        self._bar.update(tokens)
        now = self._clock()
        if self._first is None:
            self._first = self._done, now
        rate, has_bar = self.tokens_per_s, not self._bar.disable
        if rate is None or not self._is_shown or (has_bar and self._told_s is not None):
            return
        if self._told_s is None or now - self._told_s >= _EVERY_S:
            self._told_s = now
            left = hours((self._total - self._done) / rate)
            self._say(f"{self._done} of {self._total} tokens, {rate:.0f} tokens/s, {left} left")


def keep_rate(store: Path, tokens_per_s: float) -> None:
    """Write in a store how fast its producer was, for the estimate of the next one."""
    path = store / RATE_FILE
    with contextlib.suppress(ValueError), unfinished(store, path) as place:  # an estimate is not worth an end
        place.write_text(json.dumps({"tokens_per_s": tokens_per_s}), encoding="utf-8")
        place.replace(path)


def known_rate(store: Path) -> float | None:
    """Return how fast the last producer of a store was, in tokens/s; None where nobody knows."""
    try:
        rate = read_json(store / RATE_FILE)["tokens_per_s"]
    except (ValueError, OSError, KeyError, TypeError):
        return None
    return rate if isinstance(rate, float) and 0 < rate < float("inf") else None
