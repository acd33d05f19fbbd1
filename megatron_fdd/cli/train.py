"""`fdd train`, and what it shares with `fdd plan`: the entry point `megatron_fdd.distill`, on one process or many."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import runpy
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from megatron_fdd.host.console import PACKAGE
from megatron_fdd.host.plugins import PLUGINS_HERE

ENTRY_POINT = "megatron_fdd.distill"
# torchrun's default port.
_PORT = 29500
EXAMPLES = """\b
examples:
  fdd train --nproc-per-node 8 -- --load run --save run --pretrained-checkpoint student \\
      --teacher-load teacher --train-data-path data/train ...
      (killed? the same command continues from the last checkpoint)
  RANK=3 LOCAL_RANK=3 WORLD_SIZE=8 MASTER_ADDR=... MASTER_PORT=... fdd train -- --load run ...
      (set by a scheduler for each process: runs here, as this rank)
  fdd train -- --help
      (all flags: Megatron's and --fdd-*, --teacher-*)"""


class Separated(click.Command):
    """A command whose function gets the words after `--` as `flags`: the training's flags."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Give click only the words before `--`.

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
    Megatron's pretrain_gpt.py and those of this package. If RANK is set, by torchrun, Slurm or Kubernetes, the
    training runs in this process, and no flags are needed before `--`. On one node a free port is taken, unless
    --master-port names one.
    """
    if "RANK" in os.environ:
        run_here(flags)
    else:
        sys.exit(launch([*launching, "-m", ENTRY_POINT, *flags]))


def launch(words: Sequence[str], command_name: str = "fdd train") -> int:
    """Run torchrun with these words and return the exit status.

    `python -m` would search the current folder first, which may be somebody's download, and any import would run a file
    there. So the ranks do not, unless they are started in the checkout of this package; plug-ins are found there.

    A failure ends with one line in place of torchrun's report of thirty: the ranks have already printed what went
    wrong.
    """
    if "PYTHONSAFEPATH" not in os.environ and os.getcwd() != os.path.dirname(PACKAGE):
        os.environ |= {"PYTHONSAFEPATH": "1", PLUGINS_HERE: "1"}
    try:
        return _torchrun(words, command_name)
    except KeyboardInterrupt:  # before torchrun handles signals itself, which takes seconds
        return 128 + signal.SIGINT


def _torchrun(words: Sequence[str], command_name: str) -> int:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    # They log for every rank that it is ended because another one failed, and for every signal.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.elastic.agent.server.api").setLevel(logging.ERROR)
    parser = run.get_args_parser()
    parser.error = _usage_error  # type: ignore[method-assign]
    args = parser.parse_args(list(words))
    num_processes, num_nodes = _counts(args)
    if num_processes > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun would, with a long warning
    if (
        num_nodes == 1
        and args.rdzv_backend == "static"
        and not args.rdzv_endpoint
        and args.master_port == _PORT
    ):
        args.standalone = True  # a free port, so that one machine can hold several runs
    try:
        run.run(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        hint = "; out of memory?" if code == -signal.SIGKILL else ""
        click.echo(f"{command_name}: rank {rank} {how}{hint}; the other ranks were ended", err=True)
        return 1
    except SignalException as error:
        return 128 + error.sigval
    except (AssertionError, ValueError, RuntimeError, RendezvousError) as error:
        first_line, *_ = str(error).splitlines() or [type(error).__name__]
        click.echo(f"{command_name}: torchrun cannot start the ranks: {first_line}", err=True)
        return 1
    return 0


def _counts(args: argparse.Namespace) -> tuple[int, int]:
    """Return the processes of this node, and the largest number of nodes, from torchrun's flags.

    Raises:
        click.UsageError: a value would end torchrun with a traceback; names its flag.
    """
    from torch.distributed.run import determine_local_world_size, parse_min_max_nnodes

    num_processes, fewest, most = 0, 0, 0
    with contextlib.suppress(ValueError):
        num_processes = determine_local_world_size(args.nproc_per_node)
    with contextlib.suppress(ValueError, RuntimeError):
        fewest, most = parse_min_max_nnodes(args.nnodes)
    for flag, value, is_right, wanted in (
        (
            "nproc-per-node",
            args.nproc_per_node,
            num_processes > 0,
            "a number of at least 1, or auto, cpu or gpu",
        ),
        ("nnodes", args.nnodes, 0 < fewest <= most, "a number of at least 1, or MIN:MAX"),
        ("node-rank", args.node_rank, 0 <= args.node_rank < max(most, 1), "from 0 to --nnodes less 1"),
        ("master-port", args.master_port, 0 <= args.master_port < 2**16, "from 0 to 65535"),
        ("max-restarts", args.max_restarts, args.max_restarts >= 0, "at least 0"),
    ):
        if not is_right:
            _usage_error(f"--{flag} {value!r}: must be {wanted}")
    return num_processes, most


def _usage_error(message: str) -> NoReturn:
    raise click.UsageError(message)


def run_here(flags: Sequence[str], entry_point: str = ENTRY_POINT) -> None:
    """Run an entry point in this process with these flags, as `python -m` would."""
    sys.argv = [entry_point, *flags]
    runpy.run_module(entry_point, run_name="__main__", alter_sys=True)  # which exits
