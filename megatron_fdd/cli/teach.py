"""`fdd teach`: a teacher's features, computed once and stored."""

from __future__ import annotations

import os
import sys

import click

from megatron_fdd.cli.train import Separated, launch, run_here

ENTRY_POINT = "megatron_fdd.teach"
EXAMPLES = """\b
examples:
  fdd teach --engine megatron --teacher teacher --store features \\
      --data-path data/train --seq-length 2048 --train-iters 1000 --global-batch-size 64 ...
      (one process; then: fdd train ... --fdd-teacher-store features, without --teacher-load)
  fdd teach --nproc-per-node 8 -- --engine megatron --teacher teacher --store features \\
      --tensor-model-parallel-size 8 --data-path data/train ...
      (torchrun's flags before --; the teacher's own layout, whatever the student's)
  fdd teach --engine transformers --teacher teacher-hf --store features --data-path data/train ...
      (types of transformers: docs/teacher-types.md; spread over this machine's GPUs, memory and disk)
  fdd teach --engine vllm --teacher teacher-hf --store features --url http://node7:8000 \\
      --hidden-states /shared/states --data-path data/train ...
      (a running server, started as --dry-run says; has never run against a real vLLM)
  fdd teach ... --dry-run
      (how many units are new, how many bytes and hours; refused if the disk has no room)
  fdd teach ... --follow --window-bytes 200GiB
      (a stream: features are made while fdd train ... --fdd-teacher-follow reads them, and then removed)
  fdd teach ... --part 3/16
      (one of 16 producers that share the work; killed? the same command goes on)"""


class _Divided(Separated):
    """A command whose function gets the words before `--` as `launching`, and all others as `flags`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Divide the words; without `--` there are flags alone."""
        words = args if "--" in args or "--help" in args else ["--", *args]
        return super().parse_args(ctx, words)


@click.command(
    "teach",
    cls=_Divided,
    epilog=EXAMPLES,
    options_metavar="",
    context_settings={"ignore_unknown_options": True},
)
@click.argument("launching", nargs=-1, type=click.UNPROCESSED, metavar="[[TORCHRUN'S FLAGS] --] FLAGS")
def command(launching: tuple[str, ...], flags: tuple[str, ...]) -> None:
    """Run a teacher on the text of a training, and store its features for it.

    \b
    --engine ENGINE    what runs the teacher: megatron, transformers (one process), or vllm (a running
                       server, or in this process; has never run against a real vLLM)
    --teacher T        the teacher's Megatron checkpoint, or its Hugging Face folder
    --store S          folder of the store; made, or added to
    --blocks B,B,...   blocks of the teacher, 1-based (default: by the training's --fdd-layers)
    --form FORM        float32, bf16, fp8 or int8 (default: as the teacher computes)
    --part I/N         compute part I of N, which other producers share
    --batch-tokens N   tokens of one forward pass (default: 16384)
    --follow           make what a training asks for while it runs; with --window-bytes 200GiB (its room) and
                       --idle-timeout SECONDS (end without a training, default: 600)
    --dry-run          say what there is to compute, load no teacher, and write nothing into the store
    --log-folder F     where each rank's log goes (default: a temporary folder, kept where something fails)
    --device-map MAP   transformers: auto, cpu, or JSON that says where each part goes (default: auto)
    --dtype DTYPE      transformers, vllm: the teacher computes in bfloat16 or float32 (default: float32
                       with --form float32, else bfloat16)
    --url URL          vllm: a running server
    --hidden-states D  vllm: the folder in which it writes, as this machine sees it

    The other flags are those of the training whose data is read: paths, --seq-length, --seed, --train-iters,
    --global-batch-size and so on; and those of the layout in which the teacher runs, its own. Flags of the student are
    not needed. A unit of text that the store has is not computed again.
    """
    if "RANK" in os.environ:
        run_here(flags, ENTRY_POINT)
    else:
        sys.exit(launch([*launching, "-m", ENTRY_POINT, *flags], "fdd teach"))
