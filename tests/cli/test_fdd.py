"""The command `fdd`: its help, and what its subcommands start."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from click.testing import CliRunner

from megatron_fdd.cli import COMMANDS, main, run, train

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
    """Importing torch would take seconds."""
    script = (
        "import sys\nfrom click.testing import CliRunner\nfrom megatron_fdd.cli import COMMANDS, main\n"
        "for words in ([], *([name] for name in COMMANDS)):\n"
        "    result = CliRunner().invoke(main, [*words, '--help'])\n"
        "    assert result.exit_code == 0 and not {'torch', 'megatron', 'transformers'} & {*sys.modules}, words\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_command_is_installed() -> None:
    [entry] = entry_points(group="console_scripts", name="fdd")
    assert entry.load() is run


class Started:
    """Stands for the program that replaces this process."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self.args = argparse.Namespace()
        self.environment: dict[str, str] = {}

    def torchrun(self, args: argparse.Namespace) -> None:
        """Remember torchrun's arguments."""
        self.words = [args.training_script, *args.training_script_args]
        self.args, self.environment = args, dict(os.environ)

    def run_here(self, flags: Sequence[str]) -> None:
        """Remember the flags of the entry point."""
        self.words = ["here", *flags]
        self.environment = dict(os.environ)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    """Return a `Started`, without a rank's environment."""
    for name in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # so that a test's own value is undone
        monkeypatch.delenv(name)
    found = Started()
    monkeypatch.setattr("torch.distributed.run.run", found.torchrun)
    monkeypatch.setattr("megatron_fdd.cli.train.run_here", found.run_here)
    monkeypatch.setattr("megatron_fdd.cli.plan.run_here", found.run_here)
    return found


def test_a_training_is_launched_with_torchruns_flags(started: Started) -> None:
    words = "train --nproc-per-node 2 --max-restarts=1 -- --load a -- --help".split()
    assert CliRunner().invoke(main, words).exit_code == 0
    assert started.words == "megatron_fdd.distill --load a -- --help".split()
    given = started.args.module, started.args.nproc_per_node, started.args.max_restarts
    assert given == (True, "2", 1)
    assert started.environment["OMP_NUM_THREADS"] == "1"  # without it torchrun prints a long warning


@pytest.mark.parametrize(
    ("words", "takes_a_free_port"),
    [
        ("", True),
        ("--nproc-per-node 2 --nnodes 1:1", True),
        ("--standalone", True),
        ("--master-port 29501", False),
        ("--nnodes 2", False),
        ("--nnodes 1:2", False),
        ("--rdzv-endpoint host:1", False),
        ("--rdzv_backend c10d", False),
    ],
)
def test_runs_on_one_node_do_not_share_a_port(words: str, takes_a_free_port: bool, started: Started) -> None:
    result = CliRunner().invoke(main, ["train", *words.split(), "--", "--load", "a"])
    assert result.exit_code == 0, result.output
    assert started.args.standalone == takes_a_free_port


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nproc-per-node", "0"], "--nproc-per-node '0': must be a number of at least 1"),
        (["--nproc-per-node", "x"], "--nproc-per-node 'x': must be"),
        (["--nproc-per-node", ""], "--nproc-per-node '': must be"),
        (["--nproc-per-node=-1"], "--nproc-per-node '-1': must be"),
        (["--nnodes", "0"], "--nnodes '0': must be a number of at least 1, or MIN:MAX"),
        (["--nnodes", "2:1"], "--nnodes '2:1': must be"),
        (["--nnodes", "1:2:3"], "--nnodes '1:2:3': must be"),
        (["--nnodes", "2", "--node-rank", "2"], "--node-rank 2: must be from 0 to --nnodes less 1"),
        (["--master-port", "99999999"], "--master-port 99999999: must be from 0 to 65535"),
        (["--master-port", "x"], "argument --master-port/--master_port: invalid int value: 'x'"),
        (["--max-restarts", "-1"], "--max-restarts -1: must be at least 0"),
        (["--nproc_per_nod"], "--nproc"),
    ],
)
def test_a_wrong_value_of_torchruns_flags_is_named(words: list[str], message: str, started: Started) -> None:
    result = CliRunner().invoke(main, ["train", *words, "--", "--load", "a"])
    assert result.exit_code == 2, result.output
    assert f"Error: {message}" in result.output or message in result.output.splitlines()[-1]
    assert started.words == []


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), 130, ""),
        (RuntimeError("no port\nmore"), 1, "fdd train: torchrun cannot start the ranks: no port\n"),
        (AssertionError(), 1, "fdd train: torchrun cannot start the ranks: AssertionError\n"),
    ],
)
def test_torchruns_end_is_one_line_at_most(
    error: BaseException, status: int, said: str, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(_args: argparse.Namespace) -> None:
        raise error

    monkeypatch.setattr("torch.distributed.run.run", end)
    result = CliRunner().invoke(main, "train -- --load a".split())
    assert (result.exit_code, result.output) == (status, said)


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


@pytest.mark.tier("default")
def test_ranks_import_nothing_from_the_current_folder_but_plugins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A torch.py among somebody's files is not run."""
    for name in ("PYTHONSAFEPATH", "FDD_PLUGINS_HERE"):
        monkeypatch.setenv(name, "")  # so that it is taken back
        monkeypatch.delenv(name)
    monkeypatch.setattr(train, "_torchrun", lambda *_: 0)
    monkeypatch.chdir(Path(train.__file__).parents[2])
    train.launch([])
    assert "PYTHONSAFEPATH" not in os.environ  # the checkout, which may be found nowhere else
    monkeypatch.chdir(tmp_path)
    train.launch([])
    (tmp_path / "json.py").write_text("raise SystemExit('run')")
    (tmp_path / "mine.py").write_text("")
    words = "from megatron_fdd.host.plugins import import_plugins; import json; import_plugins(['mine'])"
    environment = {**os.environ, "PYTHONPATH": str(Path(train.__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", words], env=environment, check=False).returncode == 0
    del environment["FDD_PLUGINS_HERE"]
    done = subprocess.run([sys.executable, "-c", words], env=environment, capture_output=True, check=False)
    assert b"there is no module mine" in done.stderr
