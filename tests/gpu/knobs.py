"""The environment variables of `tests/gpu/run.sh` and `tests/gpu/multi.sh`, with a refusal of wrong values.

This file needs only Python, so that it works where torch does not.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


class RefusedError(ValueError):
    """A mistake that the user can correct; it is reported in one line, without a traceback."""


@dataclass(frozen=True)
class Knobs:
    """The values; the heads of the scripts explain them, and the scripts set the defaults.

    Attributes:
        wheels: sorted; empty if nothing has to be installed.
        gpus: how many GPUs to use; None: all.
    """

    device: str
    part: str
    budget_s: float
    out: Path
    state: Path
    fresh: bool
    retry: bool
    workers: int
    wheels: Sequence[Path]
    gpus: int | None

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Knobs:
        """Read the values; raise `RefusedError` for a wrong one."""
        return cls(
            device=_one_of(environment, "DEVICE", "cpu", "cuda"),
            part=_one_of(environment, "PART", "1", "2"),
            budget_s=_seconds(environment, "BUDGET_S"),
            out=Path(environment["OUT"]),
            state=Path(environment["STATE"]),
            fresh=_one_of(environment, "FRESH", "0", "1") == "1",
            retry=_one_of(environment, "RETRY", "0", "1") == "1",
            workers=_count(environment, "WORKERS"),
            wheels=_wheels(environment["WHEELS"]) if environment["WHEELS"] else (),
            gpus=_count(environment, "GPUS") if environment.get("GPUS") else None,
        )


def _one_of(environment: Mapping[str, str], name: str, *choices: str) -> str:
    """Return a value; refuse any that is not among `choices`."""
    if environment[name] not in choices:
        raise RefusedError(f"{name}={environment[name]}: must be {' or '.join(choices)}")
    return environment[name]


def _count(environment: Mapping[str, str], name: str) -> int:
    """Return a value; refuse any that is not a whole number of at least 1."""
    text = environment[name]
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise RefusedError(f"{name}={text}: must be a whole number of at least 1")
    return int(text)


def _seconds(environment: Mapping[str, str], name: str) -> float:
    """Return a value; refuse any that is not a positive finite number."""
    try:
        value = float(environment[name])
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise RefusedError(f"{name}={environment[name]}: must be a number of seconds above 0")
    return value


def _wheels(folder: str) -> Sequence[Path]:
    """Return the wheels of a folder; refuse a folder that does not exist or has none."""
    found = sorted(Path(folder).glob("*.whl"))
    if not found:
        raise RefusedError(f"WHEELS={folder}: must be a folder with wheels (*.whl)")
    return found


def refuse_absent_gpus(knobs: Knobs) -> None:
    """Refuse more GPUs than torch sees. On a CPU, say that their number is not used."""
    if knobs.gpus is None:
        return
    if knobs.device == "cpu":
        print(f"GPUS={knobs.gpus} is not used with DEVICE=cpu", flush=True)
        return
    import torch

    if knobs.gpus > (seen := torch.cuda.device_count()):
        raise RefusedError(
            f"GPUS={knobs.gpus}: torch sees {seen}; ask for at most so many, or leave GPUS out"
        )


def commit() -> str:
    """Return the commit of the tree, if it is a checkout; with a digest of what was changed since, if anything was."""
    if shutil.which("git") is None:
        return ""
    head = _said_by("git", "rev-parse", "--short", "HEAD").decode().strip()
    changed = _said_by("git", "diff", "HEAD", "--", ".", ":!benchmarks/results.jsonl")
    for name in _said_by("git", "ls-files", "--others", "--exclude-standard", "-z").split(b"\0")[:-1]:
        changed += name + Path(name.decode(errors="surrogateescape")).read_bytes()
    return f"{head}+{hashlib.sha256(changed).hexdigest()[:8]}" if changed else head


def gpus(device: str) -> str:
    """Return the names of the GPUs, a line each; empty on a CPU."""
    if device == "cpu" or shutil.which("nvidia-smi") is None:
        return ""
    return (
        _said_by("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").decode(errors="replace").strip()
    )


def _said_by(*command: str) -> bytes:
    return subprocess.run(command, capture_output=True, check=False).stdout
