"""Assertions about the ending or the metrics file of a run, for the tests of the entry point."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.entry.command import Ending, read_metrics, without_seconds


def assert_refused(endings: Iterable[Ending], pattern: str, *, most: int = 750) -> None:
    """Check that a run ended before its first step, on every rank with one line of fewer than `most` characters."""
    for rank, ending in enumerate(endings):
        assert ending.status == 1, ending.err
        start = f"rank {rank}: " if rank else ""
        errors = [
            line for line in ending.err.splitlines() if line.startswith(f"{start}megatron_fdd: error: ")
        ]
        assert len(errors) == 1, ending.err
        assert "Traceback" not in ending.err
        assert not re.search(r"iteration +\d+/", ending.out), "a training step was made"
        assert re.search(pattern, errors[0]), errors[0]
        assert len(errors[0]) < most


def metrics(folder: Path) -> list[dict[str, Any]]:
    return without_seconds(read_metrics(folder / "metrics.jsonl"))


def assert_close(folder: Path, other: Path, iterations: int) -> None:
    assert len(metrics(other)) == iterations
    for record, wanted in zip(metrics(folder), metrics(other), strict=True):
        assert record == pytest.approx(wanted, rel=1e-5, abs=1e-6)
