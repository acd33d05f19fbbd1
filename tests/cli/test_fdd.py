"""The command `fdd`: its help, and what its subcommands start."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from click.testing import CliRunner

from megatron_fdd.cli import COMMANDS, main, train

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example(name: str) -> None:
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith(f"Usage: main {name} ")
    _, _, examples = result.output.partition("examples:\n")
    assert f"fdd {name} " in examples
    assert max(map(len, result.output.splitlines())) <= 110


def test_the_list_names_every_command() -> None:
    output = CliRunner().invoke(main, ["--help"]).output
    for name, (_, line) in COMMANDS.items():
        assert f"  {name} " in output
        assert line.split()[0] in output
    result = CliRunner().invoke(main, ["distil"])
    assert result.exit_code == 2
    assert "No such command 'distil'" in result.output


@pytest.mark.tier("default")
def test_no_help_imports_torch() -> None:
    """It would take seconds."""
    script = (
        "import sys\nfrom click.testing import CliRunner\nfrom megatron_fdd.cli import COMMANDS, main\n"
        "for words in ([], *([name] for name in COMMANDS)):\n"
        "    result = CliRunner().invoke(main, [*words, '--help'])\n"
        "    assert result.exit_code == 0 and not {'torch', 'megatron', 'transformers'} & {*sys.modules}, words\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_command_is_installed() -> None:
    [entry] = entry_points(group="console_scripts", name="fdd")
    assert entry.load() is main


class Started:
    """Stands for what replaces this process."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self.environment: dict[str, str] = {}

    def torchrun(self, words: Sequence[str]) -> None:
        self.words = list(words)

    def run_here(self, flags: Sequence[str]) -> None:
        self.words = ["here", *flags]
        self.environment = dict(os.environ)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    """Without a rank's environment."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    found = Started()
    monkeypatch.setattr("torch.distributed.run.main", found.torchrun)
    monkeypatch.setattr("megatron_fdd.cli.train.run_here", found.run_here)
    monkeypatch.setattr("megatron_fdd.cli.plan.run_here", found.run_here)
    return found


def test_a_training_is_launched_with_torchruns_flags(started: Started) -> None:
    words = "train --nproc-per-node 2 --max-restarts=1 -- --load a -- --help".split()
    assert CliRunner().invoke(main, words).exit_code == 0
    expected = "--nproc-per-node 2 --max-restarts=1 -m megatron_fdd.distill --load a -- --help"
    assert started.words == expected.split()


def test_a_rank_trains_here(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    CliRunner().invoke(main, "train --nproc-per-node 2 -- --load a".split())
    assert started.words == ["here", "--load", "a"]


@pytest.mark.parametrize("name", ["train", "plan"])
@pytest.mark.parametrize("words", ["", "--load a", "--world-size 2 --load a"])
def test_flags_of_a_training_without_the_separator_are_refused(
    name: str, words: str, started: Started
) -> None:
    result = CliRunner().invoke(main, [name, *words.split()])
    assert result.exit_code == 2
    assert f"Usage: main {name} [" in result.output
    assert f"`--` is missing; the training's flags stand after it: fdd {name} ... -- --load" in result.output
    assert started.words == []


@pytest.mark.parametrize("name", ["train", "plan"])
def test_help_is_given_whatever_stands_beside_it(name: str, started: Started) -> None:
    result = CliRunner().invoke(main, [name, "--load", "a", "--help"])
    assert result.exit_code == 0
    assert result.output == CliRunner().invoke(main, [name, "--help"]).output
    assert started.words == []


def test_a_plan_is_one_process_that_trains_nothing(started: Started) -> None:
    result = CliRunner().invoke(main, "plan --world-size 64 -- --load a --bf16".split())
    assert result.exit_code == 0, result.output
    assert started.words == ["here", "--load", "a", "--bf16", "--fdd-dry-run"]
    assert started.environment["WORLD_SIZE"] == "64"
    os.environ.pop("WORLD_SIZE")


def test_the_entry_point_is_run_as_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr("runpy.run_module", lambda name, **options: ran.append((name, options, sys.argv)))
    train.run_here(["--load", "a"])
    options = {"run_name": "__main__", "alter_sys": True}
    assert ran == [("megatron_fdd.distill", options, ["megatron_fdd.distill", "--load", "a"])]


@pytest.mark.parametrize("path", [*(ROOT / "tools").glob("*.py")], ids=lambda path: path.name)
def test_a_tool_is_a_command(path: Path) -> None:
    modules = {module for module, _ in COMMANDS.values()}
    assert path.stem in modules
    assert f"from megatron_fdd.cli.{path.stem} import command\n" in path.read_text()
