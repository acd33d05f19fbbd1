"""A real launch: the text on its terminal, its logs, and the terms in Megatron's own writers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.entry.command import Ending, call_main, read_metrics, trained
from tests.entry.conftest import Toys
from tests.harness.ranks import Layout, run_on_ranks

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TIMEOUT_S = 180
TERMS = ("total", "kd", "trajectory", "delta", "trajectory s1:t2", "delta s2:t4")
WEIGHTS = "--fdd-ce-weight 0.25 --eval-interval 2 --eval-iters 1".split()


@pytest.mark.tier("all")
def test_the_terminal_of_a_launch(toy: Toys, tmp_path: Path) -> None:
    command = toy.saving_command(tmp_path, "--train-iters", 3, "--eval-interval", 2, "--eval-iters", 1)
    done = subprocess.run(
        [*LAUNCH, "-m", "megatron_fdd.distill", *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "FDD_REHEARSE": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith(" ")]
    wanted = [
        "Rehearsal: ",
        "Feature dynamics distillation: plan$",
        f"loading the models and the data; Megatron's own output: {tmp_path}/logs/rank\\*.log$",
        r"file sums of [\d.]+ [kMG]?B of checkpoints are right \(compared in [\d.]+ s; --fdd-skip-checksums",
        "teacher cross-entropy on the first batch: ",
        "WARNING: THE TEACHER IS NO BETTER THAN A UNIFORM GUESS",  # random weights
        r"step  1/3 \| \d\d:\d\d left \| [\d,]+ tok/s \| total [\d.]+ \| kd [\d.]+  trajectory [\d.]+  delta",
        "step  2/3 ",
        r"valid 2/3 \| total [\d.]+ \| kd [\d.]+  trajectory [\d.]+  delta [\d.e-]+$",
        f"saved 2/3 \\| {tmp_path} \\| in ",
        "step  3/3 ",
        "saved 3/3 ",
        "final 3/3 ",
        f"done: 3 steps; .* checkpoint: {tmp_path}$",
    ]
    assert len(lines) == len(wanted), done.stdout
    for line, pattern in zip(lines, wanted, strict=True):
        assert re.match(pattern, line), (line, pattern)
    assert "step  3/3" not in done.stderr
    logs = [(tmp_path / f"logs/rank{rank}.log").read_text() for rank in (0, 1)]
    assert "end of arguments" in logs[0]
    assert " iteration        3/       3 |" in logs[1]
    assert "step  3/3" in logs[0]


def test_a_line_has_the_numbers_of_the_metrics_file(toy: Toys, tmp_path: Path) -> None:
    """This holds also if rank 0 has the first of two stages and Megatron logs on the last."""
    command = toy.command(*WEIGHTS, "--fdd-metrics-file", tmp_path / "metrics.jsonl", "--log-interval", "2")
    [[first, last]] = trained([*command, "--pipeline-model-parallel-size", "2"])
    assert "step  " not in last.out
    # The last stage alone knows it.
    assert ["teacher cross-entropy" in ending.out for ending in (first, last)] == [False, True]
    records = [record for record in read_metrics(tmp_path / "metrics.jsonl") if "tokens" in record]
    lines = [line for line in first.out.splitlines() if line.startswith("step ")]
    assert [int(line[5:7]) for line in lines] == [1, 2, 3]
    for line, record in zip(lines, records, strict=True):
        shown = dict(re.findall(r"(total|ce|kd|trajectory|delta|grad) ([\d.e-]+)", line))
        assert list(shown) == ["total", "ce", "kd", "trajectory", "delta", "grad"]
        for name, value in shown.items():
            wanted = record["grad_norm" if name == "grad" else name]
            assert float(value) == pytest.approx(wanted, rel=2e-3, abs=5e-3), (name, line)
    shown = [line[:9] for line in first.out.splitlines() if line.startswith(("valid ", "final "))]
    assert shown == ["valid 2/3", "final 3/3"]


def run_with_writers(command: list[str]) -> tuple[Ending, list[dict[str, float]]]:
    """Return, on one rank, the ending of a run that writes to TensorBoard, and the values for a stand-in for wandb."""
    logged: list[dict[str, float]] = []
    wandb: Any = types.ModuleType("wandb")
    wandb.init = lambda **_options: None
    wandb.config = types.SimpleNamespace(update=lambda *_arguments, **_options: None)
    wandb.log = lambda values, _iteration: logged.append(
        {name: float(value) for name, value in values.items()}
    )
    wandb.finish = lambda: None
    wandb.run = types.SimpleNamespace(log_artifact=lambda *_arguments: None)
    with patch.dict(sys.modules, {"wandb": wandb}):
        return call_main(command), logged


def test_every_term_reaches_megatrons_writers(toy: Toys, tmp_path: Path) -> None:
    writers = ["--tensorboard-dir", tmp_path / "events", "--tensorboard-log-interval", 1]
    writers += ["--wandb-project", "toys", "--wandb-exp-name", "one", "--wandb-save-dir", tmp_path / "wandb"]
    command = toy.command(*WEIGHTS, *writers, "--fdd-metrics-file", tmp_path / "metrics.jsonl")
    results = run_on_ranks(run_with_writers, Layout(ranks=2), {"command": command})
    assert [ending.status for ending, _ in results] == [0, 0], results[1][0].err
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    logged = results[1][1]  # the last rank's
    steps = [record for record in read_metrics(tmp_path / "metrics.jsonl") if "tokens" in record]
    for name in (*TERMS, "ce", "share kd"):
        wanted = [record[name] for record in steps]
        assert [event.value for event in events.Scalars(name)] == wanted, name
        assert [values[name] for values in logged if name in values] == wanted, name
    for name in (*TERMS, "ce"):
        assert f"{name} validation" in events.Tags()["scalars"]
        assert any(f"{name} validation" in values for values in logged)
