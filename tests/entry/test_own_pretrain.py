"""The example of an own training script: the student learns from the script's data, and no flag names data."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.entry.command import read_metrics
from tests.entry.conftest import Toys
from tests.harness.markdown import ROOT

SCRIPT = ROOT / "examples/extend/own_pretrain.py"
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.tier("all")
def test_own_data_and_a_teacher(toy: Toys, tmp_path: Path) -> None:
    command = toy.saving_command(tmp_path, "--train-iters", 3, "--tensor-model-parallel-size", 2)
    place = command.index("--data-path")
    del command[place : place + 2]
    done = subprocess.run(
        [*LAUNCH, SCRIPT, *command],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "FDD_REHEARSE": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["iteration"] for record in records] == [1, 2, 3]
    # Every label counts, because no document ends in made-up data.
    assert {record["tokens"] for record in records} == {8 * 16}
    assert records[-1]["trajectory"] is not None


def test_it_is_short() -> None:
    assert len(SCRIPT.read_text(encoding="utf-8").splitlines()) <= 40
