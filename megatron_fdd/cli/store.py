"""`fdd store`: what is in a store of features, whether its bytes are right, and what can go."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from megatron_fdd.cli.command import Command
from megatron_fdd.host.disk import explain, sized

EXAMPLES = """\b
examples:
  fdd store info features
  fdd store check features --remove-damaged
  fdd store prune features --older-than 30"""


@click.command("store", cls=Command, epilog=EXAMPLES)
@click.argument("what", type=click.Choice(["info", "check", "prune"]), metavar="info|check|prune")
@click.argument("store", type=click.Path(path_type=Path), metavar="S")
@click.option("--remove-damaged", is_flag=True, help="check: remove damaged segments.")
@click.option(
    "--older-than",
    type=click.FloatRange(min=0),
    metavar="DAYS",
    help="prune: also remove segments that were written longer ago.",
)
def command(what: str, store: Path, remove_damaged: bool, older_than: float | None) -> None:
    """Look after a store S of a teacher's features, which `fdd teach` makes and `fdd train` reads.

    \b
    info   which teacher's features, of which blocks, in which form, how many; of a stream, what happens there
    check  read every byte, and compare it with its sums; status 1 if a segment is damaged
    prune  remove what killed producers left, and segments whose units are all in others

    check and prune leave a stream alone, which looks after itself.

    What is removed `fdd teach` makes anew. A training that reads it meanwhile ends with a message.
    """
    try:
        lines = {
            "info": _info(store),
            "check": _check(store, remove_damaged),
            "prune": _prune(store, older_than),
        }
        for line in lines[what]:
            print(line)
    except BrokenPipeError:  # click ends it quietly
        raise
    except (ValueError, OSError) as error:
        print(f"store: error: {explain(error)}", file=sys.stderr)
        sys.exit(1)


def _info(store: Path) -> Iterator[str]:
    from megatron_fdd.data.store.store import Store
    from megatron_fdd.data.store.upkeep import describe
    from megatron_fdd.data.stream.describe import describe_stream

    found = Store.open(store, "store")
    found.check_segments()  # what changed behind the index's cache
    yield from describe(found)
    yield from describe_stream(store)


def _check(store: Path, remove_damaged: bool) -> Iterator[str]:
    from megatron_fdd.data.store import upkeep
    from megatron_fdd.data.store.segment import segment_names
    from megatron_fdd.host.bar import Bar

    with Bar(total=sum(1 for _ in segment_names(store)), desc="checking", unit="segment") as bar:
        checked = upkeep.check_store(store, bar.update)
    for message in (*checked.damaged.values(), *checked.unread.values(), *checked.foreign.values()):
        print(message, file=sys.stderr)
    if checked.beside is not None:
        print(checked.beside, file=sys.stderr)
    yield (
        f"{store}: {checked.num_segments} segment(s), {len(checked.damaged)} damaged, {len(checked.unread)} "
        f"unreadable, {len(checked.foreign)} of other stores or versions; {checked.num_units} units and "
        f"{sized(checked.num_bytes)} are right"
    )
    if checked.damaged and remove_damaged:
        upkeep.remove_damaged(store, checked)
        yield f"{store}: removed {len(checked.damaged)} segment(s); fdd teach makes them anew"
    is_sound = not (checked.unread or checked.foreign or checked.beside)
    if not is_sound or (checked.damaged and not remove_damaged):
        sys.exit(1)


def _prune(store: Path, older_than: float | None) -> Iterator[str]:
    from megatron_fdd.data.store import upkeep

    count, num_bytes = upkeep.prune(store, older_than_days=older_than)
    yield f"{store}: removed {count} file(s) of {sized(num_bytes)}"
