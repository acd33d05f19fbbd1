"""Sections of a run on borrowed minutes: each in a process with a time limit, its ending on the disk at once.

A call goes on where an earlier one with the same results was cut off: what has ended is not begun again. Needs Python
alone, so that it works where torch does not.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import lines, tables

# passed, failed and hung are for good: `hung` is the section's own limit. What was cut off by the end of the whole's
# time, or skipped, is begun by a later call.
FINISHED = ("passed", "failed", "hung")
# What ends a run: Ctrl-C, the end of a job, an ssh that drops.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Of a section's log, in log.txt.
MAX_LOG_BYTES = 2**21
_TOLD = re.compile(
    r"^(FAILED|ERROR|SKIPPED|E  ) |^=+ .*\d (passed|failed|skipped|error)|[Ee]rror: |^(passed|missed): "
)
MAX_TOLD = 12


@dataclass(frozen=True)
class Section:
    """One command.

    Attributes:
        limit_s: it hangs if it takes longer.
        least_s: it is not begun with less time left: that would be wasted.
        missing: why it cannot run here.
        beside: it starts together with the one before it.
        always: also where an earlier call has run it.
    """

    name: str
    command: Sequence[str]
    limit_s: float
    least_s: float = 0.0
    missing: str = ""
    beside: bool = False
    always: bool = False


@dataclass
class Running:
    """A section's process, which leads a group of its own; and its log."""

    section: Section
    process: subprocess.Popen
    log: Path
    started: float

    def kill(self) -> None:
        """With all that it has started: its group, and while it lives what has left that, as torchrun's ranks do."""
        for pid in descendants(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Signals come afterwards: a process that starts is known by then, and ends with the run."""
    held: list[int] = []
    handlers = {
        number: signal.signal(number, lambda held_back, _: held.append(held_back)) for number in SIGNALS
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for each in held:
            signal.raise_signal(each)


def children(pid: int) -> list[int]:
    """Of a process, by /proc."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:  # it has ended
        return []


def descendants(pid: int) -> list[int]:
    """Children, and theirs."""
    own = children(pid)
    return own + [each for child in own for each in descendants(child)]


@dataclass
class Runner:
    """Runs sections and keeps results.jsonl, results.md and log.txt up to date.

    Attributes:
        out: the folder of all three.
        deadline: of all sections, on the monotonic clock.
        copy: another folder that gets a copy of the results: where a later call looks for them.
        part: which call this is.
        ended: how each section ended, of those that this call was asked for.
    """

    out: Path
    deadline: float
    title: str
    part: str = ""
    copy: Path | None = None
    ended: dict[str, str] = field(default_factory=dict)
    _running: list[Running] = field(default_factory=list)

    @property
    def results(self) -> Path:
        return self.out / "results.jsonl"

    def before(self) -> dict[str, str]:
        """How each section ended last, in this call or an earlier one."""
        return {line["name"]: line["ending"] for line in lines.read(self.results, "section")}

    def run(self, sections: Iterable[Section]) -> bool:
        """All of them, in order. Returns whether every one passed or was skipped for something missing here."""
        together: list[list[Section]] = []
        for section in sections:
            if section.beside and together:
                together[-1].append(section)
            else:
                together.append([section])
        names = [section.name for group in together for section in group]
        try:
            for group in together:
                self._begin(group)
                self._wait()
        finally:
            self.stop()
        return all(self.ended[name] in ("passed", "skipped") for name in names)

    def stop(self) -> None:
        """End what runs, as cut off; write the page."""
        cut, self._running = self._running, []
        for running in cut:  # all, before one is recorded: a full disk stops that
            running.kill()
        for running in cut:
            self._end(running, "cut", "the run was stopped")
        self._write_page()

    def _begin(self, group: list[Section]) -> None:
        before = self.before()
        for section in group:
            if before.get(section.name) in FINISHED and not section.always:
                self.ended[section.name] = before[section.name]
                print(f"== {section.name}: {before[section.name]} before", flush=True)
            elif section.missing:
                self._record(section.name, "skipped", section.missing)
            elif (left_s := self.deadline - time.monotonic()) < max(section.least_s, 1.0):
                self._record(section.name, "cut", f"not begun: {left_s:.0f} s were left")
            else:
                self._start(section)

    def _start(self, section: Section) -> None:
        print(f"\n== {section.name}: {' '.join(section.command)}", flush=True)
        log = self.out / f"{section.name}.log"
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        with log.open("w") as file, uninterrupted():
            process = subprocess.Popen(
                section.command, env=environment, stdout=file, stderr=file, start_new_session=True
            )
            self._running.append(Running(section, process, log, time.monotonic()))

    def _wait(self) -> None:
        while self._running:
            now = time.monotonic()
            for running in list(self._running):
                status = running.process.poll()
                took = now - running.started
                if status is not None:
                    ending, why = ("failed", f"status {status}") if status else ("passed", "")
                elif now > self.deadline:
                    ending, why = "cut", "the time of the whole was over"
                elif took > running.section.limit_s:
                    ending, why = "hung", f"longer than its {running.section.limit_s:.0f} s"
                else:
                    continue
                running.kill()  # what it left behind, too
                self._running.remove(running)
                self._end(running, ending, why)
            time.sleep(0.05)

    def _end(self, running: Running, ending: str, why: str) -> None:
        """Record a section whose process has ended."""
        text = ""
        if running.log.exists():
            text = running.log.read_bytes()[-MAX_LOG_BYTES:].decode(errors="replace")
            running.log.unlink()
        with (self.out / "log.txt").open("a") as file:
            file.write(f"\n== {running.section.name}, {ending} {why}\n{text}\n")
        print(text, end="", flush=True)
        seconds = round(time.monotonic() - running.started, 1)
        told = [line for line in text.splitlines() if _TOLD.search(line)][-MAX_TOLD:]
        self._record(running.section.name, ending, why, seconds=seconds, told=told)

    def _record(self, name: str, ending: str, why: str, **more: object) -> None:
        self.ended[name] = ending
        record = {"name": name, "part": self.part, "ending": ending, "why": why, **more}
        lines.write(self.results, "section", record)
        print(f"-- {name}: {ending}{f' ({why})' if why else ''}", flush=True)
        self._write_page()

    def _write_page(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        page = tables.page(lines.read(self.results), self.title)
        (self.out / "results.md").write_text(page)
        if self.copy is not None and self.copy.resolve() != self.out.resolve():
            try:
                self._copy_to(self.copy)
            except OSError as error:
                print(f"warning: STATE={self.copy} gets no more copies: {error}", flush=True)
                self.copy = None

    def _copy_to(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("results.jsonl", "results.md"):
            if (self.out / name).exists():
                shutil.copy(self.out / name, folder / name)
