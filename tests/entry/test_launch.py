"""Under torchrun itself: an error ends all processes, and a `kill -9` at any moment costs nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.entry.command import read_metrics, trained, without_seconds
from tests.entry.conftest import Toys

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LAUNCH += ["-m", "megatron_fdd.distill"]
TIMEOUT_S = 180


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "FDD_REHEARSE": "1"}


def test_an_error_is_the_end_of_all_ranks(toy: Toys) -> None:
    command = [*LAUNCH, *toy.command("--fdd-layers", 9)]
    result = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert result.returncode == 1
    lines = [line for line in result.stderr.splitlines() if "megatron_fdd: error: " in line]
    assert len(lines) == 1
    assert "--fdd-layers 9 needs a student of at least 10 layers" in lines[0]


def kill(process: subprocess.Popen) -> None:
    """SIGKILL for the launcher and everything that it started."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.kill()
    psutil.wait_procs(family)
    process.wait()


def test_a_killed_launch_resumes_bit_for_bit(toy: Toys, tmp_path: Path) -> None:
    def command(folder: Path) -> list[str]:
        places = ["--load", folder, "--save", folder, "--pretrained-checkpoint", toy.student]
        schedule = (
            "--use-distributed-optimizer --train-iters 400 --exit-interval 20 --save-interval 2".split()
        )
        return toy.command(*places, *schedule, "--fdd-metrics-file", folder / "metrics.jsonl")

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    long = [*command(killed), "--exit-interval", "400"]
    process = subprocess.Popen(
        [*LAUNCH, *long], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + TIMEOUT_S
    path = killed / "metrics.jsonl"
    while not (path.exists() and path.read_text().count("\n") >= 5):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    kill(process)
    trained(command(whole), command(killed))
    records = [without_seconds(read_metrics(folder / "metrics.jsonl")) for folder in (whole, killed)]
    assert len(records[1]) >= len(records[0]) == 20
    assert records[1][:20] == records[0]
