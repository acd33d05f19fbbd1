"""`fdd store`: what is in a store of features, whether its bytes are right, and what can go."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import click

from megatron_fdd.cli.command import Command, Interruptible
from megatron_fdd.host.disk import explain

EXAMPLES = """\b
examples:
  fdd store info features
  fdd store check features --remove-damaged
  fdd store prune features --older-than 30"""


class _Group(Interruptible, click.Group):
    """The group of what can be done with a store."""


_folder = click.argument("store", type=click.Path(path_type=Path), metavar="S")


@click.group("store", cls=_Group, epilog=EXAMPLES)
def command() -> None:
    """Look after a store of a teacher's features, which `fdd teach` makes and `fdd train` reads."""


@command.command("info", cls=Command)
@_folder
def info(store: Path) -> None:
    """Say which teacher's features are in the store S, of which blocks, in which form, and how many."""

    def run() -> None:
        from megatron_fdd.data.store.store import Store
        from megatron_fdd.data.store.upkeep import describe

        for line in describe(Store.open(store, "store")):
            print(line)

    _with_errors(run)


@command.command("check", cls=Command)
@_folder
@click.option("--remove-damaged", is_flag=True, help="Remove damaged segments; fdd teach makes them anew.")
def check(store: Path, remove_damaged: bool) -> None:
    """Read every byte of the store S, and compare it with its sums. The exit status is 1 if a segment is damaged."""

    def run() -> None:
        from tqdm import tqdm

        from megatron_fdd.data.store import upkeep
        from megatron_fdd.data.store.segment import segment_names

        with tqdm(total=sum(1 for _ in segment_names(store)), unit="segment", disable=None) as bar:
            checked = upkeep.check_store(store, bar.update)
        for message in checked.damaged.values():
            print(message, file=sys.stderr)
        print(
            f"{store}: {checked.num_segments} segments, {len(checked.damaged)} damaged; {checked.num_units} units and "
            f"{checked.num_bytes / 1e9:.3f} GB are right"
        )
        if checked.damaged and remove_damaged:
            upkeep.remove_damaged(store, checked)
            print(
                f"{store}: removed {len(checked.damaged)} segments; run fdd teach again, which makes them anew"
            )
        elif checked.damaged:
            sys.exit(1)

    _with_errors(run)


@command.command("prune", cls=Command)
@_folder
@click.option(
    "--older-than",
    type=click.FloatRange(min=0),
    metavar="DAYS",
    help="Also remove segments that were written longer ago.",
)
def prune(store: Path, older_than: float | None) -> None:
    """Remove what killed producers left in the store S, and segments whose units are all in other ones.

    A training that reads what is removed ends with a message, and goes on after fdd teach has made it again.
    """

    def run() -> None:
        from megatron_fdd.data.store import upkeep

        count, num_bytes = upkeep.prune(store, older_than_days=older_than)
        print(f"{store}: removed {count} files of {num_bytes / 1e9:.3f} GB")

    _with_errors(run)


def _with_errors(run: Callable[[], None]) -> None:
    """Run, and end with one line and status 1 at an error that the user can correct."""
    try:
        run()
    except (ValueError, OSError) as error:
        print(f"store: error: {explain(error)}", file=sys.stderr)
        sys.exit(1)
