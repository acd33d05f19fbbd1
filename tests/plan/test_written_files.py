"""The places that a run writes to: every rank checks them at the same time."""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_fdd.config import FddConfig
from megatron_fdd.plan.context import Context
from megatron_fdd.plan.written_files import check_metrics_place


def test_ranks_check_the_place_of_a_new_metrics_file_together(tmp_path: Path) -> None:
    """A rank that made the file to try it, and removed it again, took it away from another one between two looks."""
    context = Context(FddConfig(metrics_file=str(tmp_path / "metrics.jsonl")), argparse.Namespace())
    with ThreadPoolExecutor(8) as ranks:
        for check in [ranks.submit(check_metrics_place, context) for _ in range(2000)]:
            check.result()
    assert not list(tmp_path.iterdir()), "a refused run leaves no file behind"
