"""The commands in a piece of bash, as far as tests of documentation need them: which program gets which flags."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import runpy
import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import NoReturn
from unittest import mock

import click
from megatron.training.arguments import add_megatron_arguments

from megatron_fdd import cli
from megatron_fdd.config import add_fdd_args
from megatron_fdd.plan import command_line
from megatron_fdd.teach import request
from tests.harness.markdown import ROOT

TRAINING = "megatron_fdd.distill"
# Only our modules: those of other packages are not ours to check.
_OUR_SCRIPT = re.compile(r"(?:tools|tests|examples|benchmarks|megatron_fdd)/[\w./-]+\.(?:py|sh)")
_OUR_MODULE = re.compile(r"(?:megatron_fdd|benchmarks|tests|examples)(?:\.\w+)*")
_PUNCTUATION = "();&|\n"
_FLAG = re.compile(r"--[a-zA-Z][\w-]*")


@dataclass(frozen=True)
class Command:
    """A script (path from the root), module or `fdd` subcommand of the project, and the flags that follow it."""

    program: str
    flags: tuple[str, ...]


def commands(bash: str) -> Iterator[Command]:
    """Yield every call of a program of this project; `"${name[@]}"` is replaced by the words of `name=(...)`."""
    for words in _simple_commands(bash):
        at = next((index for index in range(len(words)) if _program(words, index)), None)
        if at is not None:
            program = _program(words, at)
            assert program
            rest = words[at + 1 + program.startswith("fdd ") :]
            if program == "fdd teach":  # its own flags and the training's; before -- stand torchrun's
                yield Command(program, _flags(rest[rest.index("--") :] if "--" in rest else rest))
                continue
            if "--" in rest:  # what follows is the training's
                yield Command(TRAINING, _flags(rest[rest.index("--") :]))
                # The flags of `fdd train` before `--` are torchrun's.
                rest = [] if program == "fdd train" else rest[: rest.index("--")]
            yield Command(program, _flags(rest))


def _flags(words: Iterable[str]) -> tuple[str, ...]:
    return tuple(match[0] for match in map(_FLAG.match, words) if match)


def _program(words: list[str], index: int) -> str | None:
    if words[index] in ("fdd", "megatron_fdd") and words[index + 1 :] and words[index + 1] in cli.COMMANDS:
        return f"fdd {words[index + 1]}"
    if index and words[index - 1] == "-m" and _OUR_MODULE.fullmatch(words[index]):
        return words[index]
    return words[index] if _OUR_SCRIPT.fullmatch(words[index]) else None


def _simple_commands(bash: str) -> Iterator[list[str]]:
    arrays: dict[str, list[str]] = {}
    words: list[str] = []
    tokens = _tokens(bash)
    for token in tokens:
        if token == "(" and words and words[-1].endswith("="):
            inside = [word for word in iter(lambda: next(tokens), ")") if word != "\n"]
            arrays[words.pop()[:-1]] = _filled(inside, arrays)
        elif token in _PUNCTUATION:
            yield words
            words = []
        else:
            words += _filled([token], arrays)
    yield words
    # A list may hold a whole command.
    yield from arrays.values()


def _tokens(bash: str) -> Iterator[str]:
    uncommented = re.sub(r"(?m)(^|\s)#.*$", r"\1", bash).replace("\\\n", " ")
    lexer = shlex.shlex(uncommented, posix=True, punctuation_chars=_PUNCTUATION)
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    for token in lexer:
        # Punctuation comes in runs.
        yield from token if token and set(token) <= set(_PUNCTUATION) else [token]


def _filled(words: Iterable[str], arrays: dict[str, list[str]]) -> list[str]:
    result: list[str] = []
    for word in words:
        array = re.fullmatch(r"\$\{(\w+)\[@\]\}", word)
        result += arrays.get(array[1], []) if array else [word]
    return result


class _Parsed(Exception):  # noqa: N818  (no error: it carries the flags out)
    def __init__(self, flags: Iterable[str]) -> None:
        self.flags = frozenset(flags)


def _carry_out(parser: argparse.ArgumentParser, *_: object, **__: object) -> NoReturn:
    raise _Parsed(parser._option_string_actions)


def _carry_out_click(command: click.Command, *_: object, **__: object) -> NoReturn:
    raise _Parsed(_flags_of_click(command))


def _flags_of_click(command: click.Command) -> list[str]:
    return ["--help", *(flag for option in command.params for flag in option.opts if flag.startswith("--"))]


@cache
def training_parser() -> argparse.ArgumentParser:
    """Return Megatron's parser with our flags, as `megatron_fdd.distill` reads a command line."""
    return add_fdd_args(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))


@cache
def parser_of_a_run() -> argparse.ArgumentParser:
    """Return that parser as a run changes it: every mistake is a ValueError."""
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    with mock.patch.object(command_line, "parse_args", lambda add_args: add_args(parser)):
        command_line.parse_command_line()
    return parser


@cache
def flags_of(program: str) -> frozenset[str]:
    """Return the flags that a script or module of this project knows: those of the parser that it makes."""
    if program == TRAINING:
        return frozenset(training_parser()._option_string_actions)
    if program == "fdd teach":
        return frozenset(training_parser()._option_string_actions) | frozenset(
            request.parser()._option_string_actions
        )
    if program.startswith("fdd "):
        subcommand = cli.main.get_command(click.Context(cli.main), program.removeprefix("fdd "))
        assert subcommand is not None, program
        return frozenset(_flags_of_click(subcommand))
    with (
        mock.patch.dict("os.environ"),  # benchmarks set the number of threads
        mock.patch.object(sys, "argv", [program]),
        mock.patch.object(argparse.ArgumentParser, "parse_args", _carry_out),
        mock.patch.object(argparse.ArgumentParser, "parse_known_args", _carry_out),
        mock.patch.object(click.Command, "main", _carry_out_click),
        mock.patch("megatron_fdd.host.process.end_with", lambda main: main()),  # it would end this process
        contextlib.redirect_stdout(io.StringIO()),
    ):
        try:
            if program.endswith(".py"):
                runpy.run_path(str(ROOT / program), run_name="__main__")
            else:
                runpy.run_module(program, run_name="__main__")
        except _Parsed as parsed:
            return parsed.flags
    raise AssertionError(f"{program} parses no command line")
