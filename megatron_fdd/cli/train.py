"""`fdd train` and what it shares with `fdd plan`: the entry point `megatron_fdd.distill`, on one process or many."""

from __future__ import annotations

import logging
import os
import runpy
import signal
import sys
from collections.abc import Sequence

import click

ENTRY_POINT = "megatron_fdd.distill"
EXAMPLES = """\b
examples:
  fdd train --nproc-per-node 8 -- --load run --save run --pretrained-checkpoint student \\
      --teacher-load teacher --train-data-path data/train ...
      (killed? the same command goes on from the last checkpoint)
  RANK=3 LOCAL_RANK=3 WORLD_SIZE=8 MASTER_ADDR=... MASTER_PORT=... fdd train -- --load run ...
      (set by a scheduler for each process: runs here, as this rank)
  fdd train -- --help
      (all flags: Megatron's and --fdd-*, --teacher-*)"""


class Separated(click.Command):
    """A command whose function gets as `flags` all that stands behind `--`: the training's flags."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Give click what stands before `--`.

        Raises:
            click.UsageError: there is no `--`.
        """
        cut = args.index("--") if "--" in args else len(args)
        own = args[:cut]
        if "--help" in own:
            own = ["--help"]
        elif cut == len(args):
            raise click.UsageError(
                f"`--` is missing; the training's flags stand after it: fdd {ctx.info_name} ... -- --load ...",
                ctx,
            )
        ctx.params["flags"] = tuple(args[cut + 1 :])
        return super().parse_args(ctx, own)


@click.command(
    "train",
    cls=Separated,
    epilog=EXAMPLES,
    options_metavar="",
    context_settings={"ignore_unknown_options": True},
)
@click.argument("launching", nargs=-1, type=click.UNPROCESSED, metavar="[TORCHRUN'S FLAGS] -- [FLAGS]")
def command(launching: tuple[str, ...], flags: tuple[str, ...]) -> None:
    """Distil: Megatron's own training loop with a teacher beside the student.

    Before `--` stand torchrun's flags (--nproc-per-node, --nnodes, --rdzv-endpoint ...), after it any flag of
    Megatron's pretrain_gpt.py and those of this package. Where RANK is set, by torchrun, Slurm or Kubernetes, the
    training runs in this process and what stands before `--` is not needed.
    """
    if "RANK" in os.environ:
        run_here(flags)
    else:
        sys.exit(launch([*launching, "-m", ENTRY_POINT, *flags]))


def launch(words: Sequence[str]) -> int:
    """Be torchrun with these words, but for its last word on a failure: one line in place of a report of thirty.

    The ranks have said themselves what went wrong. Returns the exit status.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    # It says of every rank that it is ended because another failed.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        torchrun(list(words))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        hint = "; out of memory?" if code == -signal.SIGKILL else ""
        click.echo(f"fdd train: rank {rank} {how}{hint}; the other ranks were ended", err=True)
        return 1
    except SignalException as error:
        return 128 + error.sigval
    return 0


def run_here(flags: Sequence[str]) -> None:
    """Be the entry point with these flags, as `python -m` would."""
    sys.argv = [ENTRY_POINT, *flags]
    runpy.run_module(ENTRY_POINT, run_name="__main__", alter_sys=True)  # which exits
