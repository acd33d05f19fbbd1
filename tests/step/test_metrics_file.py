"""A metrics file that cannot be written: the place, what is still good, and a torn line that the next start drops."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import IO, Any
from unittest.mock import patch

import pytest

from megatron_fdd.step.metrics import MetricsFile

real_open = Path.open


def on_a_full_disk(path: Path, mode: str = "r", *more: Any, **keywords: Any) -> IO[Any]:
    """Open a file; one to which something is appended lies on a disk without room."""
    return real_open(Path("/dev/full") if mode == "a" else path, mode, *more, **keywords)


def test_a_full_disk_says_what_is_still_good(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4")
    with patch("megatron_fdd.step.metrics.get_args", return_value=argparse.Namespace(save=str(tmp_path))):
        file = MetricsFile(str(path), 1)
        file.write(1, {"total": 2.0})
        told = (
            rf"^--fdd-metrics-file {path}: cannot be written: No space left on device \(\d+ MiB free there\); make "
            r"room there, or give another place. The same command then goes on from the last whole checkpoint "
            r"\(of iteration 4\)$"
        )
        with patch("pathlib.Path.open", on_a_full_disk), pytest.raises(ValueError, match=told):
            file.write(2, {"total": 1.0})
        path.write_text(path.read_text() + '{"iteration": 2, "tot')
        MetricsFile(str(path), 5).write(5, {"total": 1.0})
    assert [line[:15] for line in path.read_text().splitlines()] == ['{"iteration": 1', '{"iteration": 5']
