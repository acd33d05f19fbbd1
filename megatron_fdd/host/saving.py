"""Errors of a checkpoint that cannot be written, and the checkpoint from which a run would continue."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from torch.distributed.checkpoint import CheckpointException

from megatron_fdd.host.checkpoint import RELEASE, read_tracker
from megatron_fdd.host.damage import cause_of

# Megatron's writer logs the system's message and raises an error that has only its type.
_WRITER = "megatron.core.dist_checkpointing.strategies.filesystem_async"
_VAGUE = "Worker failure"
# How a rank reports a collective that another rank has left (NCCL, the store; gloo), in the words of `cause_of`.
_LOST = re.compile(
    r"^(Dist\w+Error: |RuntimeError: .*(gloo|nccl|connection (reset|closed|refused)|broken pipe))",
    re.IGNORECASE,
)


class _LastError(logging.Handler):
    """Keeps the first error that a logger is given: it is the cause, the others are its consequences."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.text: str | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if self.text is None:
            self.text = record.getMessage()


@contextmanager
def heard_failures(folder: str, iteration: int) -> Iterator[None]:
    """Explain what went wrong while Megatron writes a checkpoint to `folder`, on every rank.

    Raises:
        ValueError: it could not be written; names the folder, the system's message, and how to continue.
    """
    heard = _LastError()
    logger = logging.getLogger(_WRITER)
    logger.addHandler(heard)
    try:
        yield
    except (CheckpointException, OSError, RuntimeError) as error:
        cause = cause_of(error)
        if heard.text is not None and _VAGUE in cause:
            cause = heard.text
        whole = last_whole_checkpoint(folder)
        if _LOST.search(cause):
            raise ValueError(
                f"--save {folder}: another rank ended while the checkpoint of iteration {iteration} was written; see "
                f"what that rank says. The same command goes on from {whole}"
            ) from error
        raise ValueError(
            f"--save {folder}: the checkpoint of iteration {iteration} could not be written: {cause} "
            f"({shutil.disk_usage(folder).free >> 20} MiB free there). Once it can be, the same command goes on from "
            f"{whole}"
        ) from error
    finally:
        logger.removeHandler(heard)


def last_whole_checkpoint(folder: str | None) -> str:
    """Name the newest whole checkpoint in a folder of --save, in a sentence."""
    last = saved_iteration(folder)
    return f"the last whole checkpoint ({'there is none yet' if last is None else f'of iteration {last}'})"


def saved_iteration(folder: str | None) -> int | None:
    """Return the step of the newest whole checkpoint in a folder of --save; None without one."""
    with suppress(ValueError):  # whatever the file says: this is read for a message
        label = read_tracker(folder) if folder else None
        return None if label in (None, RELEASE) else int(str(label))
    return None
