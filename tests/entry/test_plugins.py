"""A plug-in in a training: the command line's is imported, one that a checkpoint names is not."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from unittest.mock import patch

from tests.entry import damage
from tests.entry.checks import assert_refused
from tests.entry.command import Ending, run_commands
from tests.entry.conftest import Toys
from tests.harness.ranks import Layout, run_on_ranks

PLUGIN = "from pathlib import Path\nPath(__file__).with_suffix('.ran').touch()\n"


def run_in(folder: Path, commands: list[list[str]]) -> list[Ending]:
    """Body on every rank: the entry point in another current folder."""
    with contextlib.chdir(folder), patch.object(sys, "path", [*sys.path]):
        return run_commands(commands)


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
