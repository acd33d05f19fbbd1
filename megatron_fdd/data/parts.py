"""Sets that are written in parts, so that a killed run can continue after its last whole part.

.NAME.partial/               beside the sets of --output-prefix .../NAME; removed when they are whole
    lock                     held by the run that writes there
    progress.json            what was done up to the last whole part, and with which settings
    part-0001/, part-0002/   prepared sets, joined at the end
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_fdd.data.prepared import SetKind, SetWriter, move_sets
from megatron_fdd.data.tally import Tally
from megatron_fdd.data.tokenizer_identity import TokenizerStamp
from megatron_fdd.host.disk import check_no_link, regular_file, replacing

# The seconds of work that a kill costs at most.
PART_SECONDS = 60.0


@dataclass(slots=True)
class Done:
    """The progress of a run.

    Attributes:
        documents: how many documents of the inputs were read, refused and empty ones included.
        num_bytes: how many bytes of the inputs were read for them.
        dealt: how many documents each set got.
        tally: counts and refusals so far.
        parts: how many parts are whole.
    """

    documents: int = 0
    num_bytes: int = 0
    dealt: list[int] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    parts: int = 0

    def state(self) -> dict[str, Any]:
        """Return the progress as JSON values."""
        names = ("documents", "num_bytes", "dealt", "parts")
        return {**{name: getattr(self, name) for name in names}, "tally": self.tally.state()}


class Parts:
    """The parts of the sets of one run; a context manager.

    Args:
        prefixes: the prefixes of the sets, all in one folder.
        name: `--output-prefix` without its folder.
        fingerprint: a hash of everything that decides what is in the sets; None for inputs that cannot be read again.

    Raises:
        ValueError: another run writes to these prefixes.
    """

    def __init__(
        self,
        prefixes: Sequence[str],
        name: str,
        kind: SetKind,
        tokenizer: TokenizerStamp,
        fingerprint: str | None,
    ) -> None:
        self._prefixes, self._kind, self._tokenizer = prefixes, kind, tokenizer
        self._fingerprint = fingerprint
        self.folder = _folder(os.path.join(os.path.dirname(prefixes[0]), name))
        check_no_link(self.folder, f"--output-prefix {prefixes[0]}")
        self.folder.mkdir(exist_ok=True)
        self._lock = regular_file("--output-prefix", self.folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"--output-prefix {prefixes[0]}: another fdd prepare writes there; wait for it, or give another name"
            ) from error
        self.done = self._read()
        self.writers = self._new_writers()
        self._began_s = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()
        if self.done.parts == 0:
            shutil.rmtree(self.folder)

    def is_due(self) -> bool:
        """Whether enough was done since the last part to keep a new one."""
        return self._fingerprint is not None and time.monotonic() - self._began_s > PART_SECONDS

    def keep(self) -> None:
        """End a part; from now on the same command continues from here."""
        for writer in self.writers:
            writer.finish()
        for path in self._part(self.done.parts + 1).iterdir():
            _to_disk(path)
        self.done.parts += 1
        state = {"fingerprint": self._fingerprint, **self.done.state()}
        with replacing(self.folder / "progress.json") as partial:
            partial.write_text(json.dumps(state), encoding="utf-8")
            _to_disk(partial)
        self.writers = self._new_writers()
        self._began_s = time.monotonic()

    def commit(self, preparation: Mapping[str, Any]) -> None:
        """Move the whole sets to their places.

        Args:
            preparation: `SetInfo.preparation`.
        """
        whole = self.writers
        if self.done.parts > 0:
            for writer in self.writers:
                writer.finish()
            whole = self._joined()
        for writer in whole:
            writer.finish(preparation)
        names = [(writer.prefix, prefix) for writer, prefix in zip(whole, self._prefixes, strict=True)]
        move_sets(names)
        self.done.parts = 0  # not needed any more

    def _joined(self) -> list[SetWriter]:
        """Return writers of sets that hold all parts, one after the other."""
        (self.folder / "joined").mkdir(exist_ok=True)
        writers = self._writers_in(self.folder / "joined")
        for number in range(1, self.done.parts + 2):
            for writer in writers:
                writer.add_set(str(self._part(number) / os.path.basename(writer.prefix)))
        return writers

    def _read(self) -> Done:
        try:
            state = _progress(self.folder)
            if state.pop("fingerprint") != self._fingerprint:
                return Done()
            return Done(**{**state, "tally": Tally.from_state(state["tally"])})
        except (OSError, ValueError, KeyError, TypeError):  # none yet, or not ours
            return Done()

    def _new_writers(self) -> list[SetWriter]:
        """Return writers for the part after the last whole one; what a killed run left of that part is removed."""
        part = self._part(self.done.parts + 1)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        return self._writers_in(part)

    def _writers_in(self, folder: Path) -> list[SetWriter]:
        names = [str(folder / os.path.basename(prefix)) for prefix in self._prefixes]
        return [SetWriter(name, self._kind, self._tokenizer) for name in names]

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number:04}"


def kept_documents(output_prefix: str) -> int:
    """Return how many input documents a run with this `--output-prefix` need not read again; 0 without parts."""
    try:
        return int(_progress(_folder(output_prefix))["documents"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _progress(folder: Path) -> dict[str, Any]:
    """Read what a run has kept of its progress; nothing where it has kept none."""
    path = folder / "progress.json"
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return kept


def _folder(output_prefix: str) -> Path:
    path = Path(os.path.abspath(output_prefix))
    return path.with_name(f".{path.name}.partial")


def _to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
