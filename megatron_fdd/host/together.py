"""An error of one rank that is raised on every rank, so that none waits in a collective for a rank that has ended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


@contextmanager
def together() -> Iterator[None]:
    """Raise an error of one rank in the block on every rank.

    Collectives: one all-gather over all ranks at the end of the block.

    Raises:
        OSError: the error of the first rank that has one, if it is an error of the system.
        ValueError: otherwise, with the message of that rank.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as failure:
        error = failure
    told: list[str | OSError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, None if error is None else _message(error))
    first = next((each for each in told if each is not None), None)
    if isinstance(first, OSError):
        raise first from error
    if first is not None:
        raise ValueError(first) from error


def _message(error: Exception) -> str | OSError:
    """Return the system's errors and our own messages unchanged, and other messages with the type of the error."""
    if isinstance(error, OSError) and error.errno is not None:  # a plain OSError: every rank can read it
        return OSError(error.errno, error.strerror, error.filename, None, error.filename2)
    return str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"
