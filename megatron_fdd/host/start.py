"""The first lines of a training script: what has to happen before Megatron is imported."""

from __future__ import annotations

import importlib
import sys

from megatron_fdd.host import console, rehearsal
from megatron_fdd.host.process import print_error


def start() -> None:
    """Divide the terminal from the log, and start a rehearsal on CPUs where one is wanted.

    With `--help` only silence the remarks that packages make on import; with `--fdd-verbose` leave the terminal alone.
    Ends the process with status 1 and one line where a rehearsal cannot be had.
    """
    if not {"-h", "--help"}.isdisjoint(sys.argv):
        importlib.import_module("megatron_fdd.host.quiet")
    elif "--fdd-verbose" not in sys.argv:
        console.divide()  # before anything of Megatron prints
    try:
        if rehearsal.is_wanted():
            rehearsal.start()  # before Megatron looks for a GPU
            console.say("Rehearsal: Megatron runs on CPUs (gloo, no fused kernels); not for speed.")
    except ValueError as error:
        print_error(f"megatron_fdd: error: {error}")
        sys.exit(1)
