"""The doctor's toy run on a CPU, compared with the curve in the package. To write the curve again:

GOLDEN=write python -m pytest tests/doctor/test_toy.py
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from megatron_fdd.doctor import toy

CURVE = Path(toy.__file__).parent / "curve.txt"
# Allows for another processor's rounding of float32, as in tests/entry/test_golden_curve.py.
RELATIVE = 0.5e-5


@pytest.mark.tier("all")
def test_twenty_steps_on_a_cpu_are_the_committed_ones() -> None:
    rows = toy.steps("cpu")
    if os.environ.get("GOLDEN") == "write":
        lines = [
            [f"{name:>14}" for name in toy.COLUMNS],
            *([f"{row[n]:14.8g}" for n in toy.COLUMNS] for row in rows),
        ]
        CURVE.write_text("".join(" ".join(line) + "\n" for line in lines))
    assert toy.distance(rows, toy.committed()) < RELATIVE


def test_the_curve_is_one_worth_holding_to() -> None:
    rows = toy.committed()
    assert len(rows) == toy.NUM_STEPS
    assert rows[-1]["total"] < 0.9 * rows[0]["total"]
    assert all(value > 0 for row in rows for value in row.values())


def test_a_run_that_ended_early_is_no_match() -> None:
    with pytest.raises(RuntimeError, match="19 steps were made, 20 are needed"):
        toy.distance(toy.committed()[:-1], toy.committed())


def test_a_run_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "a warning\nmegatron_fdd: error: --load is empty\nChildFailedError\n"
    ended = subprocess.CompletedProcess([], 1, "", said)
    monkeypatch.setattr(subprocess, "run", lambda *_words, **_options: ended)
    with pytest.raises(RuntimeError, match="exit status 1: megatron_fdd: error: --load is empty"):
        toy._train(tmp_path, "cpu")
