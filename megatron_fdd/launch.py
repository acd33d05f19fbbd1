"""What a rank owes its launcher: which rank it is, and an error that is heard."""

from __future__ import annotations

import os
import time

from megatron_fdd import console

# How much later than another rank rank 0 may come to the same error: what its imports and reading differ by.
PATIENCE_S = 15.0


def is_first_rank() -> bool:
    """Whether this process is rank 0 of the launch (torchrun's environment)."""
    return os.environ.get("RANK", "0") == "0"


def report_error(line: str) -> None:
    """Print `line` on stderr before this rank ends: once for all ranks, whichever of them is the quickest.

    As soon as one rank has ended torchrun ends the others, rank 0 with its message perhaps among them. So another
    rank waits until rank 0 has spoken and is itself ended meanwhile. If it is not, the error is its own: it says so.
    """
    if not is_first_rank():
        time.sleep(PATIENCE_S)
        line = f"rank {os.environ['RANK']}: {line}"
    console.complain(line)
