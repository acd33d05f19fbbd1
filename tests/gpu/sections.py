"""Sections of a run on a borrowed machine: each is a process with a time limit, and its ending is saved at once.

A call continues where an earlier one with the same results was cut off: a section that has ended does not start again.
This file needs only Python, so that it works where torch does not.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import lines, tables

# These endings are final, the first for ever; `hung` means that the section exceeded its own limit. A section that was
# skipped, or cut off because the time for all was over, starts again in a later call.
FINISHED = ("passed", "failed", "hung")
# The signals that end a run: Ctrl-C, the end of a job, a lost ssh connection.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# The most bytes of a section's log in log.txt.
MAX_LOG_BYTES = 2**21
_TOLD = re.compile(
    r"^(FAILED|ERROR|SKIPPED|E  ) |^=+ .*\d (passed|failed|skipped|error)|[Ee]rror: |^(passed|missed): "
)
MAX_TOLD = 12


def say(text: str, end: str = "\n") -> None:
    """Print at once; where nobody reads it any more, the run goes on without a word."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115


@dataclass(frozen=True)
class Section:
    """One command.

    Attributes:
        limit_s: after this time the section counts as hung.
        least_s: the section does not start with less time left, which would be wasted.
        missing: why the section cannot run here.
        beside: whether it starts together with the section before it.
        always: whether it runs even if an earlier call has run it.
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
    """A section's process, which leads a process group of its own, and the section's log."""

    section: Section
    process: subprocess.Popen
    log: Path
    started: float

    def kill(self) -> None:
        """Kill the process and its descendants: its group and, while it lives, others such as torchrun's ranks."""
        for pid in descendants(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay signals to the end of the block, so that a process that starts is known and ends with the run."""
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
    """Return the children of a process, from /proc."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:  # it has ended
        return []


def descendants(pid: int) -> list[int]:
    """Return the children of a process, their children, and so on."""
    own = children(pid)
    return own + [each for child in own for each in descendants(child)]


@dataclass
class Runner:
    """The execution of sections, which keeps results.jsonl, results.md and log.txt up to date.

    Attributes:
        out: the folder of these three files.
        deadline: the end of the time for all sections, on the monotonic clock.
        copy: another folder that gets a copy of the results; a later call looks for them there.
        part: the number of this call.
        retries: whether sections that failed or hung in an earlier call start again.
        ended: how each section of this call ended.
    """

    out: Path
    deadline: float
    title: str
    part: str = ""
    copy: Path | None = None
    retries: bool = False
    ended: dict[str, str] = field(default_factory=dict)
    _running: list[Running] = field(default_factory=list)

    @property
    def results(self) -> Path:
        return self.out / "results.jsonl"

    def before(self) -> dict[str, str]:
        """Return how each section ended last, in this call or an earlier one."""
        return {line["name"]: line["ending"] for line in lines.read(self.results, "section")}

    def misses(self) -> list[str]:
        """Return how each section of this call ended that neither passed nor was skipped, with what its log told."""
        last = {line["name"]: line for line in lines.read(self.results, "section")}
        missed = [last[name] for name, ending in self.ended.items() if ending not in ("passed", "skipped")]
        return [
            text
            for line in missed
            for text in (f"-- {line['name']}: {line['ending']} {line['why']}", *line.get("told", ()))
        ]

    def run(self, sections: Iterable[Section]) -> bool:
        """Run all sections in order. Return whether each passed, or was skipped because something is missing here."""
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
        """End the running sections and record them as cut off; write the page."""
        cut, self._running = self._running, []
        for running in cut:  # all are killed before one is recorded, which a full disk may prevent
            running.kill()
        for running in cut:
            self._end(running, "cut", "the run was stopped")
        self._write_page()

    def _begin(self, group: list[Section]) -> None:
        before = self.before()
        for section in group:
            final = FINISHED[:1] if self.retries else FINISHED
            if before.get(section.name) in final and not section.always:
                self.ended[section.name] = before[section.name]
                say(f"== {section.name}: {before[section.name]} before")
            elif section.missing:
                self._record(section.name, "skipped", section.missing)
            elif (left_s := self.deadline - time.monotonic()) < max(section.least_s, 1.0):
                self._record(section.name, "cut", f"not begun: {left_s:.0f} s were left")
            else:
                self._start(section)

    def _start(self, section: Section) -> None:
        say(f"\n== {section.name}: {' '.join(section.command)}")
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
                running.kill()  # also the processes that it left behind
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
        say(text, end="")
        seconds = round(time.monotonic() - running.started, 1)
        told = [line for line in text.splitlines() if _TOLD.search(line)][-MAX_TOLD:]
        self._record(running.section.name, ending, why, seconds=seconds, told=told)

    def _record(self, name: str, ending: str, why: str, **more: object) -> None:
        self.ended[name] = ending
        record = {"name": name, "part": self.part, "ending": ending, "why": why, **more}
        lines.write(self.results, "section", record)
        say(f"-- {name}: {ending}{f' ({why})' if why else ''}")
        self._write_page()

    def _write_page(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        page = tables.page(lines.read(self.results), self.title)
        (self.out / "results.md").write_text(page)
        if self.copy is not None and self.copy.resolve() != self.out.resolve():
            try:
                self._copy_to(self.copy)
            except OSError as error:
                say(f"warning: STATE={self.copy} gets no more copies: {error}")
                self.copy = None

    def _copy_to(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("results.jsonl", "results.md"):
            if (self.out / name).exists():
                shutil.copy(self.out / name, folder / name)
