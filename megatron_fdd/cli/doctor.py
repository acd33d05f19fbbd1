"""`fdd doctor`: whether this machine is fit for a training run."""

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
    help="Also run an all-reduce over all visible GPUs, and 20 steps of a toy on one GPU, compared with a CPU's. "
    "Has not run on a GPU yet.",
)
def command(gpu: bool) -> None:
    """Check what a training needs of this machine, with one line for each check: ok, warn or FAIL, and the remedy.

    The checks: versions; each place of Megatron that this package calls or replaces, by its signature in the installed
    Megatron; TransformerEngine, NCCL, shared memory, limits. The exit status is 1 if a check fails.
    """
    from megatron_fdd.doctor import run

    sys.exit(run(gpu))
