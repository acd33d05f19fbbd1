"""The flags of a producer that follows a training."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Following:
    """How a producer of a stream follows a training.

    Attributes:
        window_bytes: what may be asked for and kept at once.
        idle_s: how long to wait for a sign of life of the training.
    """

    window_bytes: int
    idle_s: float


def add_stream_flags(own: argparse._ArgumentGroup) -> None:
    """Add the flags of a stream to a producer's parser."""
    own.add_argument(
        "--follow",
        action="store_true",
        help="make what a training with --fdd-teacher-follow asks for, while it runs, in place of all its data",
    )
    own.add_argument(
        "--window-bytes",
        type=size_in_bytes,
        metavar="SIZE",
        help="room of the stream, such as 200GiB: what the training asks for ahead and keeps",
    )
    own.add_argument(
        "--idle-timeout",
        type=float,
        metavar="SECONDS",
        help="end, with status 0, when the training has given no sign of life for so long (600)",
    )


def following(given: argparse.Namespace) -> Following | None:
    """Refuse flags of a stream that do not go together; return what they say.

    Raises:
        ValueError: names the flag.
    """
    if not given.follow:
        for flag, value in (("--window-bytes", given.window_bytes), ("--idle-timeout", given.idle_timeout)):
            if value is not None:
                raise ValueError(f"{flag} {value}: is for a stream; give --follow too, or leave it out")
        return None
    if given.window_bytes is None:
        raise ValueError("--follow: give --window-bytes, the room of the stream, such as 200GiB")
    if given.part != (0, 1):
        raise ValueError(
            f"--part {given.part[0]}/{given.part[1]}: leave it out: producers of a stream share whatever is asked for"
        )
    if given.dry_run:
        raise ValueError("--dry-run: with --follow nothing is known beforehand; leave one out")
    idle_s = 600.0 if given.idle_timeout is None else given.idle_timeout
    if not 0 < idle_s < float("inf"):
        raise ValueError(f"--idle-timeout {idle_s:g}: must be above 0, and finite")
    return Following(given.window_bytes, idle_s)


def size_in_bytes(text: str) -> int:
    """Read a size such as 200GiB. argparse.ArgumentTypeError if it is none."""
    found = re.fullmatch(r"([0-9]{1,15})(?:([kKMGT])(i?)B)?", text)
    if not found or int(found[1]) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 200GiB, 500MB or a number of bytes")
    return int(found[1]) * (1024 if found[3] else 1000) ** (
        " KMGT".index(found[2].upper()) if found[2] else 0
    )
