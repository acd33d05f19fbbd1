"""Real launches: an error ends all processes and is shown, Ctrl-C says how to continue, a `kill -9` costs nothing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from megatron_fdd.cli.train import ENTRY_POINT
from megatron_fdd.plan.save_folder import locked
from tests.entry.command import read_metrics, trained, without_seconds
from tests.entry.conftest import Toys

RANKS = ["--standalone", "--nproc-per-node", "2"]
LAUNCH = [sys.executable, "-m", "megatron_fdd", "train", *RANKS, "--"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", *RANKS]
TIMEOUT_S = 180


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "FDD_REHEARSE": "1"}


def stderr_of_a_launch(launch: Sequence[str], command: Sequence[object]) -> list[str]:
    """Return the lines of a launch that ends in a user's error."""
    result = subprocess.run(
        [*launch, *map(str, command)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert result.returncode == 1
    assert "The last lines" not in result.stderr  # no log is shown, because this is the user's error
    return result.stderr.splitlines()


@pytest.mark.tier("all")
def test_an_error_is_the_end_of_all_ranks(toy: Toys) -> None:
    why, who = stderr_of_a_launch(LAUNCH, toy.command("--fdd-layers", 9))
    assert why.startswith("megatron_fdd: error: --fdd-layers 9 needs a student of at least 10 layers")
    assert re.fullmatch(r"fdd train: rank \d ended with status 1; the other ranks were ended", who)


# The way in which `python -m megatron_fdd.distill` handles an error, in a process that starts quickly.
ENDING = """
import os, sys, time
from megatron_fdd.host import process as launch
rank, case = int(os.environ["RANK"]), sys.argv[1]
launch.PATIENCE_S = float(sys.argv[2])
if rank == 0:
    time.sleep(1 if case == "late" else 30)
launch.print_error(f"megatron_fdd: error: {case}")
sys.exit(1)
"""


@pytest.mark.parametrize(
    ("case", "patience_s", "said"),
    [
        ("late", 20, "megatron_fdd: error: late"),  # rank 0 meets the error a second after rank 1
        ("alone", 1, "rank 1: megatron_fdd: error: alone"),  # rank 0 does not meet it
    ],
)
def test_an_error_is_heard_whoever_is_quicker(case: str, patience_s: int, said: str, tmp_path: Path) -> None:
    script = tmp_path / "ending.py"
    script.write_text(ENDING)
    lines = stderr_of_a_launch(TORCHRUN, [script, case, patience_s])
    assert [line for line in lines if "megatron_fdd: error: " in line] == [said]


@pytest.mark.tier("all")
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_says_how_to_go_on(end: signal.Signals, toy: Toys, tmp_path: Path) -> None:
    """While the run works, no other run gets its folder."""
    places = ["--load", tmp_path, "--save", tmp_path, "--pretrained-checkpoint", toy.student]
    command = toy.command(
        *places, *"--train-iters 4000 --lr-decay-iters 4000 --save-interval 2 --log-interval 2".split()
    )
    process = subprocess.Popen(
        [*LAUNCH, *command],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("saved") and len(lines) > 1:
            with pytest.raises(ValueError, match="another run saves there"), locked(str(tmp_path)):
                pass
            if end == signal.SIGINT:
                os.killpg(process.pid, end)  # a terminal does the same
            else:
                process.send_signal(end)
            break
    lines += process.stdout.readlines()
    assert process.wait(TIMEOUT_S) == 128 + end
    assert process.stderr.read() == ""
    saved = int((tmp_path / "latest_checkpointed_iteration.txt").read_text())
    ending = re.fullmatch(
        rf"interrupted after step (\d+) of 4000; the same command goes on after step {saved}, from {tmp_path}\n",
        lines[-1],
    )
    assert ending is not None, lines[-1]
    assert int(ending[1]) >= saved


def test_an_interruption_of_the_imports_is_quiet(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*LAUNCH, "--save", tmp_path],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    launcher = psutil.Process(process.pid)
    while len(ranks := [child for child in launcher.children() if ENTRY_POINT in child.cmdline()]) < 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    while not all(any("libtorch_cpu" in file.path for file in rank.memory_maps()) for rank in ranks):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=TIMEOUT_S) == ("", "")
    assert process.returncode == 128 + signal.SIGINT


def kill(process: subprocess.Popen) -> None:
    """Send SIGKILL to the launcher and everything that it started."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.kill()
    psutil.wait_procs(family)
    process.wait()


@pytest.mark.tier("all")
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
