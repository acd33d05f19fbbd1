"""A training's folder of --save while an export watches it: which checkpoint is next, and when no more will come."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from megatron_fdd.convert.checksums import CHECKSUMS_FILE
from megatron_fdd.host import console
from megatron_fdd.host.checkpoint import find_checkpoint, iteration_folder, read_checkpoint_args
from megatron_fdd.host.file_sums import SUMS_FILE
from megatron_fdd.host.saving import saved_iteration

# The sums of a save come after the tracker. Another program writes none.
_SUMS_S = 600.0
_INDEX_FILE = ".metadata"


@dataclass(frozen=True, slots=True)
class End:
    """The end of a watch: its last line, and whether that is an error."""

    line: str
    is_failure: bool


@dataclass(slots=True)
class WatchedFolder:
    """What one process knows of a watched folder.

    Attributes:
        load: the folder that the training gave to --save.
        out: gets a folder `iter_NNNNNNN` for each checkpoint.
        idle_s: how long to wait for a new checkpoint.
        exported: the iterations that this watch has exported.
        refused: those that it could not export.
    """

    load: Path
    out: Path
    idle_s: float
    clock: Callable[[], float] = time.monotonic
    exported: list[int] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)
    _failed_once: set[int] = field(default_factory=set)
    _seen_s: dict[int, float] = field(default_factory=dict)
    _looked_at: int | None = None
    _last_s: float = field(init=False)

    def __post_init__(self) -> None:
        self._last_s = self.clock()

    def next_step(self) -> int | End | None:
        """Return the iteration to export now, the oldest first; the end, if no more will come; or None: not yet."""
        newest = saved_iteration(str(self.load))
        waiting = [each for each in self._saved(newest) if not self._is_done(each)]
        for iteration in sorted(self._failed_once.difference(waiting)):
            self._failed_once.discard(iteration)
            console.complain(
                f"iteration {iteration} is not exported: the training removed it while it was read"
            )
        ready = [each for each in waiting if self._is_whole(each, newest)]
        if ready:
            return ready[0]
        # Where nothing was left to do from the start, a longer training may be about to go on from there.
        has_worked = bool(self.exported or self.refused)
        if has_worked and not waiting and newest is not None and self._is_last(newest):
            return self._end(f"the training has ended with iteration {newest}")
        if self.clock() - self._last_s >= self.idle_s:
            return self._end(f"no new checkpoint for {self.idle_s:g} s")
        return None

    def place(self, iteration: int) -> Path:
        """Return where an iteration is exported to."""
        return iteration_folder(self.out, iteration)

    def note(self, iteration: int, error: str) -> None:
        """Note that an iteration is exported, or why not: then it is tried once more, if it is still there."""
        self._last_s = self.clock()
        if not error:
            self.exported.append(iteration)
            self._failed_once.discard(iteration)
        elif iteration in self._failed_once:
            self._failed_once.discard(iteration)
            self.refused.append(iteration)
            console.complain(f"iteration {iteration} is not exported: {error}")
        else:
            self._failed_once.add(iteration)

    def _end(self, why: str) -> End:
        line = f"{self.out}: {len(self.exported)} checkpoint(s) of {self.load} exported; {why}"
        if self.refused:
            numbers = ", ".join(map(str, self.refused))
            line += f"; not exported, see above: {numbers}; the same command tries them again"
        return End(line, bool(self.refused))

    def _saved(self, newest: int | None) -> list[int]:
        """Return the iterations that have a folder; one beyond the tracker is still being written."""
        found = [
            int(match[1])
            for path in self.load.glob("iter_*")
            if (match := re.fullmatch(r"iter_(\d{7,})", path.name))
        ]
        return sorted(each for each in found if newest is not None and each <= newest)

    def _is_done(self, iteration: int) -> bool:
        return iteration in self.refused or (self.place(iteration) / CHECKSUMS_FILE).is_file()

    def _is_whole(self, iteration: int, newest: int | None) -> bool:
        """Whether a checkpoint has its index and its sums; it has none of them while it is saved a second time."""
        folder = iteration_folder(self.load, iteration)
        if not (folder / _INDEX_FILE).is_file():
            return False
        seen_s = self._seen_s.setdefault(iteration, self.clock())
        return iteration != newest or (folder / SUMS_FILE).is_file() or self.clock() - seen_s >= _SUMS_S

    def _is_last(self, newest: int) -> bool:
        """Whether a checkpoint is that of the training's last step, as its arguments say. Each is read once."""
        if newest == self._looked_at:
            return False
        self._looked_at = newest
        with suppress(ValueError, OSError):
            path = find_checkpoint(str(self.load), "--load", step=newest, to_plan=True, leaves_objects=True)
            steps = getattr(read_checkpoint_args(path, "--load"), "train_iters", None)
            return type(steps) is int and 0 < steps <= newest
        return False
