"""Random changes of valid inputs, given to everything that reads one, for as long as one likes. Run by hand:

    python -m tests.hostile.fuzz --minutes 60
    python -m tests.hostile.fuzz --only config --seed 1234 --cases 1      (one case again)

Each case may be accepted, or end in a ValueError or OSError of one line. Anything else is a finding: another
exception, also one that a message quotes ("TypeError: ..."), a message of several lines, a signal, more than 30 s of
computing. A batch of cases runs in a child process, forked after the imports; the next batch goes on after one that
died. A case is its target and one number.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import tests.harness.rank_image  # before Megatron is imported  # noqa: F401
from tests.hostile.fuzz_inputs import make_toys
from tests.hostile.fuzz_targets import TARGETS, Target

# Seconds of computing; a case that waits for ever is ended after as many minutes.
LIMIT_S = 30
_BATCH = 50
VERBOSE = "--verbose" in sys.argv
_QUOTED = re.compile(
    r"\b(Type|Key|Attribute|Index|ZeroDivision|Overflow|Recursion|Assertion|Unbound|Name|Runtime)Error\b"
)
# Messages that quote the error of somebody else's program on purpose.
_FOREIGN = re.compile(r"the chat template refuses it|cannot be read \(|cannot load --tokenizer-model")


@dataclass
class Found:
    """What happened in all cases: counts of ends, and the first case of every kind of finding."""

    ends: Counter[str] = field(default_factory=Counter)
    cases: Counter[str] = field(default_factory=Counter)
    findings: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def note(self, target: str, seed: int, end: str) -> None:
        self.cases[target] += 1
        if end in ("accepted", "refused"):
            self.ends[f"{target}: {end}"] += 1
            return
        self.findings[f"{target}: {end}"].append(str(seed))
        if len(self.findings[f"{target}: {end}"]) == 1:
            print(f"FINDING {target} --seed {seed}: {end}", flush=True)


def end_of(target: Target, seed: int, root: Path) -> str:
    """Run one case; return "accepted", "refused", or what went wrong."""
    folder = Path(tempfile.mkdtemp(dir=root))
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            target.run(random.Random(seed), folder)
    except (ValueError, OSError) as error:
        message = str(error)
        if "\n" in message.strip():
            return f"several lines: {_short(message)}"
        if not message.strip():
            return f"no words: {type(error).__name__} at {_place(error)}"
        if _QUOTED.search(message) and not _FOREIGN.search(message):
            return f"quoted: {_short(message)}"
        if VERBOSE:
            print(f"{target.name} {seed}: {message[:300]}", file=sys.__stderr__, flush=True)
        return "refused"
    except (SystemExit, MemoryError, Exception) as error:
        return f"{type(error).__name__} at {_place(error)}: {_short(str(error))}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return "accepted"


def _short(message: str) -> str:
    return re.sub(r"\d+", "N", re.sub(r"/\S+/", "", " ".join(message.split())))[:160]


def _place(error: BaseException) -> str:
    """Return the last line of ours that the error came through, and the last line of all."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "megatron_fdd" in frame.filename] or frames
    return " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in (frames[-1], ours[-1]))


def run_batch(target: Target, seeds: list[int], root: Path, found: Found) -> None:
    """Run cases in a child, and note the end of each; a case at which the child dies or hangs is a finding."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _answer(target, seeds, root, writer)
    os.close(writer)
    left = iter(seeds)
    with os.fdopen(reader) as lines:
        signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
        signal.alarm(60 * LIMIT_S)
        for line in lines:
            signal.alarm(60 * LIMIT_S)
            found.note(target.name, next(left), line.rstrip("\n"))
        signal.alarm(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        is_late = number in (signal.SIGKILL, signal.SIGXCPU)
        end = f"more than {LIMIT_S} s" if is_late else f"signal {number}"
        found.note(target.name, next(left), end)


def _answer(target: Target, seeds: list[int], root: Path, writer: int) -> None:
    with os.fdopen(writer, "w") as lines:
        for seed in seeds:
            used_s = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
            resource.setrlimit(resource.RLIMIT_CPU, (int(used_s) + LIMIT_S, resource.RLIM_INFINITY))
            lines.write(" ".join(end_of(target, seed, root).split()) + "\n")
            lines.flush()
    os._exit(0)


def _in_child(act: Callable[[], None]) -> None:
    """Run a function in a child, so that what it leaves in memory is not forked again."""
    child = os.fork()
    if child == 0:
        act()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0, "the valid inputs could not be made"


def report(found: Found, minutes: float) -> str:
    """Return the counts and the findings in lines."""
    lines = [
        f"{minutes:.1f} minutes, {sum(found.cases.values()):,} cases, {len(found.findings)} kinds of findings"
    ]
    for name, count in sorted(found.cases.items()):
        refused = found.ends[f"{name}: refused"]
        lines.append(
            f"{name}: {count:,} cases, {refused:,} refused, {found.ends[f'{name}: accepted']:,} accepted"
        )
    for kind, seeds in sorted(found.findings.items()):
        lines.append(f"FINDING ({len(seeds)}) {kind} [--seed {', '.join(seeds[:3])}]")
    return "\n".join(lines)


def main() -> int:
    """Run until the time is over; status 1 if something was found."""
    parser = argparse.ArgumentParser(description="Give changed inputs to everything that reads one.")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--only", choices=[target.name for target in TARGETS], action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, help="stop after so many cases of each target")
    parser.add_argument("--verbose", action="store_true", help="print the message of every refusal")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    targets = [target for target in TARGETS if options.only is None or target.name in options.only]
    found, started_s = Found(), time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        _in_child(lambda: make_toys(Path(root)))
        seed = options.seed
        while time.monotonic() - started_s < 60 * options.minutes:
            for target in targets:
                size = max(1, int(_BATCH * target.speed)) if options.cases is None else options.cases
                run_batch(target, list(range(seed, seed + size)), Path(root), found)
            seed += _BATCH * 4
            if options.cases is not None:
                break
    print(report(found, (time.monotonic() - started_s) / 60))
    return bool(found.findings)


if __name__ == "__main__":
    sys.exit(main())
