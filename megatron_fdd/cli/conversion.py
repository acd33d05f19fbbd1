"""The shared parts of the conversion commands: options, and an end with one closing line or one line of error."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import click

from megatron_fdd.host.disk import explain
from megatron_fdd.host.process import is_first_rank, print_error

# M_MMAP_THRESHOLD in <malloc.h>.
_M_MMAP_THRESHOLD = -3
FOLDER = click.Path(path_type=Path)

dtype = click.option(
    "--dtype",
    type=click.Choice(["checkpoint", "float32", "bfloat16", "float16"]),
    default="checkpoint",
    show_default=True,
    help="Dtype of the weights; `checkpoint`: as they are stored.",
)
max_shard_size = click.option(
    "--max-shard-size",
    default="5GB",
    show_default=True,
    metavar="SIZE",
    help="Largest file of weights, such as 5GB or 500MB.",
)


def convert(action: Callable[[], str]) -> NoReturn:
    """Run `action`, print the line that it returns (on rank 0) and exit.

    An expected error is one line on stderr and status 1.
    """
    # torch reads it once. Pages of 2 MiB make new memory, of which a conversion needs much, less than half as costly.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    gc.disable()  # a tenth of the imports' time would go to looking through half a million objects that stay
    from megatron_fdd.host import rehearsal  # imports torch, and `--help` is quick

    logging.getLogger("megatron").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    _give_memory_back()
    try:
        if rehearsal.is_wanted():
            rehearsal.start()  # before Megatron is imported, which would import a compiler
        gc.freeze()
        gc.enable()
        closing_line = action()
    except (ValueError, OSError) as error:
        gc.freeze()  # torch's writer crashes when it is collected after its disk was full
        print_error(f"error: {explain(error)}")
        sys.exit(1)
    if is_first_rank():
        print(closing_line, flush=True)
    sys.exit(0)


def _give_memory_back() -> None:
    """Make a tensor of one MiB or more leave memory when it is freed, for the rest of this process.

    By default glibc keeps freed blocks of up to 32 MiB in its heap once one has been freed: about 100 MiB for a
    process, differently from run to run. Other C libraries have no such setting.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)
