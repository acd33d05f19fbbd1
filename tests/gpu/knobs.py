"""What the environment says to `tests/gpu/run.sh` and `tests/gpu/multi.sh`; odd values are refused.

Needs Python alone, so that it works where torch does not.
"""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


class RefusedError(ValueError):
    """What its user can mend: told in one line, without a traceback."""


@dataclass(frozen=True)
class Knobs:
    """As the heads of the scripts tell them, which also set what is left out.

    Attributes:
        wheels: sorted; none where nothing is to be installed.
        gpus: how many of them; None: all.
    """

    device: str
    part: str
    budget_s: float
    out: Path
    state: Path
    fresh: bool
    workers: int
    wheels: Sequence[Path]
    gpus: int | None

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Knobs:
        """Raises `RefusedError` for an odd value."""
        return cls(
            device=_one_of(environment, "DEVICE", "cpu", "cuda"),
            part=_one_of(environment, "PART", "1", "2"),
            budget_s=_seconds(environment, "BUDGET_S"),
            out=Path(environment["OUT"]),
            state=Path(environment["STATE"]),
            fresh=_one_of(environment, "FRESH", "0", "1") == "1",
            workers=_count(environment, "WORKERS"),
            wheels=_wheels(environment["WHEELS"]) if environment["WHEELS"] else (),
            gpus=_count(environment, "GPUS") if environment.get("GPUS") else None,
        )


def _one_of(environment: Mapping[str, str], name: str, *choices: str) -> str:
    """Refuse another value."""
    if environment[name] not in choices:
        raise RefusedError(f"{name}={environment[name]}: must be {' or '.join(choices)}")
    return environment[name]


def _count(environment: Mapping[str, str], name: str) -> int:
    """Refuse what is not a whole number from 1."""
    text = environment[name]
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise RefusedError(f"{name}={text}: must be a whole number of at least 1")
    return int(text)


def _seconds(environment: Mapping[str, str], name: str) -> float:
    """Refuse what is not a positive finite number."""
    try:
        value = float(environment[name])
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise RefusedError(f"{name}={environment[name]}: must be a number of seconds above 0")
    return value


def _wheels(folder: str) -> Sequence[Path]:
    """Refuse a folder that is not there or has none."""
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
    """Of the tree, where it is a checkout."""
    if shutil.which("git") is None:
        return ""
    result = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return result.stdout.strip()
