"""`fdd doctor`: is this machine fit for a training?"""

from __future__ import annotations

import sys

import click

from megatron_fdd.cli.command import Command

EXAMPLES = """\b
examples:
  fdd doctor
  fdd doctor --gpu      (before renting a week)"""


@click.command("doctor", cls=Command, epilog=EXAMPLES)
@click.option(
    "--gpu",
    is_flag=True,
    help="Also an all-reduce over all visible GPUs, and 20 steps of a toy on one, held to a CPU's. "
    "Has not run on a GPU yet.",
)
def command(gpu: bool) -> None:
    """Check what a training needs of this machine, one line each: ok, warn or FAIL, with the remedy.

    Versions; each place of Megatron that this package calls or replaces, by its signature in the Megatron that is
    installed; TransformerEngine, NCCL, shared memory, limits. Ends with status 1 where something fails.
    """
    from megatron_fdd.doctor import run

    sys.exit(run(gpu))
