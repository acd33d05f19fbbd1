"""What the conversion tools share: one closing line, or one line that says what is wrong."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import logging
import warnings
from collections.abc import Callable

from megatron_fdd.launch import is_first_rank, report_error

# Of <malloc.h>.
_M_MMAP_THRESHOLD = -3
DTYPE_CHOICES = ("checkpoint", "float32", "bfloat16", "float16")


def teaching_parser(description: str, examples: str) -> argparse.ArgumentParser:
    """A parser whose help keeps the line breaks of its description and examples."""
    return argparse.ArgumentParser(
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_via(parser: argparse.ArgumentParser) -> None:
    """The flag --via of both directions."""
    parser.add_argument(
        "--via",
        choices=("tables", "bridge"),
        default="tables",
        help="bridge: let Megatron-Bridge convert a DeepSeek-V3, GLM-4.5, gpt-oss or Nemotron model, which our tables "
        "lack. It must be installed, with TransformerEngine, on a machine with a GPU. One process then holds the "
        "whole model in host memory",
    )


def run_tool(action: Callable[[], str]) -> int:
    """Run it and print the line it returns (on rank 0). An expected error is one line on stderr and exit 1."""
    logging.getLogger("megatron").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    _give_memory_back()
    try:
        closing_line = action()
    except (ValueError, OSError) as error:
        report_error(f"error: {error}")
        return 1
    if is_first_rank():
        print(closing_line, flush=True)
    return 0


def _give_memory_back() -> None:
    """Let a tensor of a MiB or more leave memory when it is freed, for the rest of this process.

    glibc by itself keeps freed blocks of up to 32 MiB in its heap once one has been freed: 100 MiB a process, more or
    less from run to run. Other C libraries have no such knob.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)
