"""Plug-ins in a training: the command line's plug-in is imported, one that a checkpoint names is not."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from unittest.mock import patch

from megatron_fdd.ops.divergence import DIVERGENCES
from tests.entry import damage
from tests.entry.checks import assert_refused
from tests.entry.command import Ending, read_metrics, run_commands
from tests.entry.conftest import Toys
from tests.harness.markdown import ROOT
from tests.harness.ranks import Layout, run_on_ranks

DIVERGENCE = "examples.extend.divergence"
PLUGIN = "from pathlib import Path\nPath(__file__).with_suffix('.ran').touch()\n"


def run_in(folder: Path, commands: list[list[str]]) -> list[Ending]:
    """Run, on every rank, the entry point in another current folder."""
    with contextlib.chdir(folder), patch.object(sys, "path", [*sys.path]):
        return run_commands(commands)


def run_with_a_divergence(command: list[str]) -> list[Ending]:
    """Body on every rank: the entry point in the checkout; the name that its plug-in adds is gone afterwards."""
    with patch.dict(DIVERGENCES):
        try:
            return run_in(ROOT, [command])
        finally:
            sys.modules.pop(DIVERGENCE, None)


def test_the_example_of_a_divergence_trains(toy: Toys, tmp_path: Path) -> None:
    flags = ("--fdd-plugin", DIVERGENCE, "--fdd-kd-divergence", "tv", "--fdd-trajectory-divergence", "tv")
    command = toy.command(*flags, "--fdd-metrics-file", tmp_path / "metrics.jsonl")
    for (ending,) in run_on_ranks(run_with_a_divergence, Layout(ranks=2), {"command": command}):
        assert ending.status == 0, ending.err
    for record in read_metrics(tmp_path / "metrics.jsonl"):
        assert 0 < record["kd"] < 1, "the most that two distributions can differ by"
        assert 0 < record["trajectory"] < 1


def test_a_command_line_can_name_one_and_a_checkpoint_can_not(toy: Toys, tmp_path: Path) -> None:
    for name in ("wanted_plugin", "unwanted_plugin"):
        (tmp_path / f"{name}.py").write_text(PLUGIN)
    stored = {"fdd_plugin": ["unwanted_plugin"], "plugin": ["unwanted_plugin"]}
    student = damage.with_args(toy.student, tmp_path / "student", **stored)
    teacher = damage.with_args(toy.teacher, tmp_path / "teacher", **stored)
    flags = toy.command("--load", student, "--teacher-load", teacher, "--fdd-plugin", "wanted_plugin")
    commands = [flags, [*flags, "--fdd-plugin=absent.module"]]
    by_rank = run_on_ranks(run_in, Layout(ranks=2), {"folder": tmp_path, "commands": commands})
    trained, refused = zip(*by_rank, strict=True)
    assert [ending.status for ending in trained] == [0, 0], trained[0].err
    assert "\n  plug-ins: wanted_plugin\n" in trained[0].out
    assert "iteration        3/" in trained[0].out + trained[1].out
    assert [path.stem for path in tmp_path.glob("*.ran")] == ["wanted_plugin"]
    assert_refused(refused, "error: --fdd-plugin absent.module: there is no module absent: install it")
