"""The behaviour that all subcommands share."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

import click
import pytest
from click.testing import CliRunner

from megatron_fdd.cli import COMMANDS, main
from megatron_fdd.cli.command import Command
from megatron_fdd.cli.train import Separated

# These pass flags on, which are checked where the training starts.
OWN = sorted(COMMANDS.keys() - {"teach", "train", "plan"})
# An option for which an empty text has a meaning.
MEANT = {("evaluate", "--prompt")}


def command_of(name: str) -> click.Command:
    """Return the click command of a subcommand."""
    command: click.Command = importlib.import_module(f"megatron_fdd.cli.{COMMANDS[name][0]}").command
    return command


def test_every_command_is_one_of_the_two_kinds() -> None:
    for name in COMMANDS:
        assert isinstance(command_of(name), Command if name in OWN else Separated), name


def empty_values() -> list[tuple[str, str]]:
    """Return each (command, option or argument that takes a value)."""
    options = [(name, option) for name in OWN for option in command_of(name).params]
    return [
        (name, option.opts[0] if isinstance(option, click.Option) else "")
        for name, option in options
        if not (isinstance(option, click.Option) and option.is_flag)
    ]


@pytest.mark.parametrize(("name", "flag"), empty_values())
def test_an_empty_value_is_refused(name: str, flag: str) -> None:
    """The value is empty as in `--save "$UNSET"`, whatever else is missing."""
    result = CliRunner().invoke(command_of(name), [flag, ""] if flag else [""])
    assert result.exit_code == 2, result.output
    is_refused = "its value is empty (an unset variable?); give one" in result.output
    assert is_refused == ((name, flag) not in MEANT)
    assert not is_refused or f"Invalid value for '{flag}" in result.output


# Options that take texts and not names: tokens, fields, lines, JSON.
TEXTS = {
    ("evaluate", "--prompt"),
    *(("prepare", flag) for flag in ("--document-separator", "--json-key", "--prompt-key", "--response-key")),
    ("prepare", "--eod-token"),
    *((name, "--chat-template-kwargs") for name in ("prepare", "evaluate")),
}


@pytest.mark.parametrize(("name", "flag"), empty_values())
def test_a_value_that_is_no_name_is_refused(name: str, flag: str) -> None:
    [option] = [each for each in command_of(name).params if flag in ("", *each.opts)][:1]
    if (name, flag) in TEXTS or not isinstance(option.type, click.Path | click.types.StringParamType):
        return
    for value, fault in ((" ", "its value is blank"), ("runs/a\n", "holds the end of a line")):
        result = CliRunner().invoke(command_of(name), [flag, value] if flag else [value])
        assert result.exit_code == 2, result.output
        assert fault in result.output


@pytest.mark.parametrize("value", ["fdd= runs", "fdd=runs "])
def test_a_name_behind_a_name_is_asked_too(value: str, tmp_path: Path) -> None:
    for words in (["evaluate", "--hf-model", value], ["report", value, "--out", str(tmp_path / "out")]):
        assert "begins or ends with a blank" in CliRunner().invoke(main, words).output


@pytest.mark.parametrize("value", ["fdd=", "=folder"])
def test_half_a_name_is_refused(value: str, tmp_path: Path) -> None:
    for words in (["evaluate", "--hf-model", value], ["report", value, "--out", str(tmp_path / "out")]):
        result = CliRunner().invoke(main, words)
        assert result.exit_code == (2 if words[0] == "evaluate" else 1)
        assert f"{value}: must be NAME=PATH" in result.output


@pytest.mark.parametrize(
    "flag", ["--teacher", "--hf-model", "--data", "--vicuna-answers", "--validation-text"]
)
def test_what_is_not_there_is_refused_with_its_flag(flag: str) -> None:
    result = CliRunner().invoke(main, ["evaluate", "--hf-model", ".", flag, "nowhere"])
    assert result.exit_code == 2
    assert f"Invalid value for '{flag}': " in result.output
    assert "'nowhere' does not exist" in result.output


def test_numbers_that_fill_a_machine_are_refused() -> None:
    most = 4 * (os.cpu_count() or 1)
    result = CliRunner().invoke(main, ["evaluate", "--hf-model", ".", "--threads", str(most + 1)])
    assert result.exit_code == 2
    assert f"'--threads': {most + 1}: at most {most}" in result.output
    result = CliRunner().invoke(
        main, "import --hf-model . --save x --make-vocab-size-divisible-by 999999999999".split()
    )
    assert result.exit_code == 2
    assert "'--make-vocab-size-divisible-by': 999999999999 is not in the range" in result.output


def interrupted(*_: object) -> None:
    """Raise what Ctrl-C raises."""
    raise KeyboardInterrupt


@pytest.mark.parametrize("words", [[], ["doctor"]])
def test_an_interrupted_command_says_so_once(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One case is a script of tools/ (a command by itself), the other is `fdd` while it imports the command."""
    if words:
        monkeypatch.setattr(type(main), "get_command", interrupted)
    command = main if words else Command("prepare", callback=interrupted)
    result = CliRunner().invoke(command, words, prog_name="fdd")
    assert result.exit_code == 130
    assert result.output == "fdd: interrupted\n"


def test_a_terminated_command_says_so_with_its_own_status() -> None:
    def callback() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    result = CliRunner().invoke(Command("prepare", callback=callback), prog_name="fdd")
    assert result.exit_code == 143
    assert result.output == "fdd: interrupted\n"


def test_other_packages_are_quiet_in_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("torch.utils.cpp_extension")
    monkeypatch.setattr(logger, "filters", [])
    monkeypatch.delitem(sys.modules, "megatron_fdd.host.quiet", raising=False)
    assert CliRunner().invoke(Command("x", callback=lambda: None)).exit_code == 0
    assert not logger.filter(logging.LogRecord(logger.name, 30, "", 0, "No CUDA runtime is found", (), None))


def test_what_cannot_be_printed_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(**_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(command_of("report"), "callback", fill)
    ended = CliRunner().invoke(main, ["report", "r", "--out", "o"])
    assert ended.exit_code == 1
    assert ended.stderr.endswith(
        "report: error: what it prints cannot be written: [Errno 28] No space left on device; make room there\n"
    )
