"""What all subcommands share: they refuse empty values, keep other packages quiet, and end when interrupted."""

from __future__ import annotations

import importlib
import os
import sys
from contextlib import suppress
from typing import Any

import click

from megatron_fdd.host import plugins
from megatron_fdd.host.console import complain
from megatron_fdd.host.given_name import fault_of
from megatron_fdd.host.process import ended_like_interrupt, print_error, status_after

_THREADS_A_CORE = 4


class Interruptible(click.Command):
    """A command that Ctrl-C ends with one line and status 130, even while it imports.

    click alone would print "Aborted!".
    """

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; Ctrl-C ends it with status 130."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            complain(f"{ctx.command_path}: interrupted")
            ctx.exit(status_after(interrupt))


class Command(Interruptible):
    """A command that has only options of its own, unlike `train`, which passes others on.

    Args:
        may_be_empty: names of options for which an empty text has a meaning.
        free_texts: names of options for which blanks and line ends have one.
    """

    def __init__(
        self,
        *args: Any,
        may_be_empty: tuple[str, ...] = (),
        free_texts: tuple[str, ...] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._may_be_empty = may_be_empty
        self._free_texts = free_texts

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse values that are no names, such as an empty one: as a path, it would mean the current folder.

        Raises:
            click.BadParameter: a value is empty, or is a name that nothing has.
        """
        given, _, _ = self.make_parser(ctx).parse_args(list(args))
        for option in self.get_params(ctx):
            value = given.get(option.name or "")
            for each in value if isinstance(value, list | tuple) else (value,):
                fault = fault_of(each) if isinstance(each, str) and self._is_checked(option, each) else None
                if fault is not None:
                    raise click.BadParameter(fault, ctx, option)
        return super().parse_args(ctx, args)

    def _is_checked(self, option: click.Parameter, value: str) -> bool:
        """Whether a value must be a name, or at least not empty."""
        if not value:
            return option.name not in self._may_be_empty
        is_text = isinstance(option.type, click.Path | click.types.StringParamType)
        return is_text and option.name not in self._free_texts

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, with other packages quiet; SIGTERM and SIGHUP end it as Ctrl-C does."""
        importlib.import_module("megatron_fdd.host.quiet")  # before the command imports torch
        try:
            with ended_like_interrupt():
                return super().invoke(ctx)
        except BrokenPipeError:  # click ends it quietly
            raise
        except OSError as error:  # commands explain those of their files: this is of what they print
            complain(f"{ctx.command_path}: error: what it prints cannot be written: {error}; make room there")
            with suppress(OSError):
                sys.stdout.close()  # else the interpreter tries again when it ends
            ctx.exit(1)


def _import_plugins(ctx: click.Context, _option: click.Parameter, names: tuple[str, ...]) -> None:
    if names:
        importlib.import_module("megatron_fdd.host.quiet")  # before a plug-in imports torch
    try:
        plugins.import_plugins(names)
    except ValueError as error:
        print_error(f"error: {error}")
        ctx.exit(1)


plugin = click.option(
    plugins.FLAG,
    multiple=True,
    expose_value=False,
    is_eager=True,
    callback=_import_plugins,
    metavar="MODULE",
    help=f"Import this module first, so that names which it registers are known; {plugins.WHERE}; repeatable.",
)


def _trust_checkpoints(_ctx: click.Context, _option: click.Parameter, is_given: bool) -> None:
    if is_given:
        importlib.import_module("megatron_fdd.host.quiet")  # before torch
        importlib.import_module("megatron_fdd.host.unpickling").trust_checkpoints()


trust_checkpoint = click.option(
    "--fdd-trust-checkpoint",
    is_flag=True,
    expose_value=False,
    callback=_trust_checkpoints,
    help="Unpickle whatever the checkpoint holds, which lets it run code with your rights (default: objects of a few "
    "harmless classes only).",
)


skip_checksums = click.option(
    "--fdd-skip-checksums",
    "skip_checksums",
    is_flag=True,
    help="Do not compare the checkpoint's files with their sums first; that reads them once more.",
)


def few_threads(_ctx: click.Context, _option: click.Parameter, given: int | None) -> int | None:
    """Return the value of an option for threads; with very many threads a command would seem to hang.

    Raises:
        click.BadParameter: the value is above four for each core.
    """
    most = _THREADS_A_CORE * (os.cpu_count() or 1)
    if given is not None and given > most:
        raise click.BadParameter(f"{given}: at most {most}, {_THREADS_A_CORE} for each core of this machine")
    return given
