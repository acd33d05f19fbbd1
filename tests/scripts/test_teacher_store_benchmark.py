"""The benchmark of a stored teacher: a tiny run takes turns as it says."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from benchmarks import teacher_store
from benchmarks.teacher_store_run import Held
from benchmarks.teacher_store_turns import Alternation
from tests.harness.ranks import Layout, clean_megatron, run_on_ranks


def smoke(folder: Path) -> tuple[int, str, list[Any]]:
    """Run, on one rank, the command with all its runs in this process."""
    seen = []

    def here(_pool: None, function: Callable[..., Any], *arguments: Any) -> Any:
        result = function(*arguments)
        clean_megatron()
        if result is not None:
            seen.append(result)
        return result

    printed = io.StringIO()
    with (
        patch.object(teacher_store, "in_own_process", here),
        patch.object(teacher_store, "new_process", lambda _device: None),
        patch.object(teacher_store, "RESULTS", folder / "results.jsonl"),
        contextlib.redirect_stdout(printed),
    ):
        status = teacher_store.main(["--smoke", "--folder", str(folder)])
    return status, printed.getvalue(), seen


@pytest.mark.tier("default")
def test_tiny_run(tmp_path: Path) -> None:
    [(status, printed, seen)] = run_on_ranks(smoke, Layout(ranks=1), {"folder": tmp_path})
    assert status == 0
    assert [line.split(",")[0].split(":")[0] for line in printed.splitlines() if line[0] != " "] == [
        *("megatron", "transformers", "memory", "memory", "step")
    ]
    megatron, transformers, small, large, taught, step = seen
    blocks = teacher_store.SMOKE["count"] // teacher_store.SMOKE["block"]
    for producer in (megatron, transformers):
        assert isinstance(producer, Alternation)
        assert len(producer.ours) == len(producer.bare) == blocks
        assert producer.parts["states"] > 0
    token_bytes = 2 * teacher_store.SMOKE["width"] * (teacher_store.SMOKE["taps"] + 1)
    for held, count in zip((small, large), teacher_store.SMOKE["units"], strict=True):
        assert isinstance(held, Held)
        assert held.store_bytes > count * teacher_store.SMOKE["seq_length"] * token_bytes
    assert isinstance(taught, Held)
    assert len(step.ours) == len(step.bare) == teacher_store.SMOKE["count"]
    assert len(step.waits) == len(step.ours)
    assert not (tmp_path / "results.jsonl").exists(), "a trial is not recorded"
