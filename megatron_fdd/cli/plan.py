"""`fdd plan`: which rank does what, and the memory it needs."""

from __future__ import annotations

import os

import click

from megatron_fdd.cli.train import Separated, run_here

EXAMPLES = """\b
examples:
  fdd plan --world-size 64 -- --pretrained-checkpoint student --teacher-load teacher \\
      --use-checkpoint-args --tensor-model-parallel-size 8 ...
  fdd import --hf-model Qwen3-235B-A22B --save plan/teacher --config-only
      (a checkpoint to plan with, before the weights are downloaded)"""


@click.command(
    "plan", cls=Separated, epilog=EXAMPLES, options_metavar="[--world-size N] -- [FLAGS OF TRAINING]"
)
@click.option(
    "--world-size",
    type=click.IntRange(min=1),
    metavar="N",
    help="Ranks of the planned training; default: WORLD_SIZE if it is set, else 1.",
)
def command(world_size: int | None, flags: tuple[str, ...]) -> None:
    """Print what `fdd train -- FLAGS` would do: layers and taps of every stage, terms, estimated memory of a rank.

    One process without a GPU is enough, whatever the size of the training, and so are checkpoints without weights.
    Nothing is trained or written. If the training would be refused, one line says why, and the exit status is 1.
    """
    if world_size is not None:
        os.environ["WORLD_SIZE"] = str(world_size)
    run_here([*flags, "--fdd-dry-run"])
