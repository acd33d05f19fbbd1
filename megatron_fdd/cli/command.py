"""What all subcommands do alike: refuse values that are empty, keep other packages quiet, end when interrupted."""

from __future__ import annotations

import importlib
import os
from typing import Any

import click

from megatron_fdd.host.console import complain

_THREADS_A_CORE = 4


class Interruptible(click.Command):
    """Ctrl-C ends it with one line and status 130, also while it still imports; click alone would say "Aborted!"."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run it."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            complain(f"{ctx.command_path}: interrupted")
            ctx.exit(130)


class Command(Interruptible):
    """A command of its own options, unlike `train`, which passes others' on.

    Args:
        may_be_empty: names of options for which an empty text has a meaning.
    """

    def __init__(self, *args: Any, may_be_empty: tuple[str, ...] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._may_be_empty = may_be_empty

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse empty values, as an unset variable of the shell leaves them: a path would mean the current folder.

        Raises:
            click.BadParameter: there is one.
        """
        given, _, _ = self.make_parser(ctx).parse_args(list(args))
        for option in self.get_params(ctx):
            value = given.get(option.name or "")
            values = value if isinstance(value, list | tuple) else (value,)
            if "" in values and option.name not in self._may_be_empty:
                raise click.BadParameter(
                    "its value is empty (an unset variable?); give one, or leave the flag out",
                    ctx,
                    option,
                )
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run it."""
        importlib.import_module("megatron_fdd.host.quiet")  # before the command imports torch
        return super().invoke(ctx)


def few_threads(_ctx: click.Context, _option: click.Parameter, given: int | None) -> int | None:
    """The value of an option, which with very many threads would seem to hang.

    Raises:
        click.BadParameter: it is above four a core.
    """
    most = _THREADS_A_CORE * (os.cpu_count() or 1)
    if given is not None and given > most:
        raise click.BadParameter(f"{given}: at most {most}, {_THREADS_A_CORE} for each core of this machine")
    return given
