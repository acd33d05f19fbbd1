"""`fdd export`: from a Megatron checkpoint to a Hugging Face model folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import click

from megatron_fdd.cli import conversion
from megatron_fdd.cli.command import Command, plugin, skip_checksums, trust_checkpoint

if TYPE_CHECKING:
    from megatron_fdd.convert.to_hf import Exported, ExportOptions

# With --watch: how long to wait for a new checkpoint, and the most that can be asked for.
_IDLE_S, _LONGEST_S = 6 * 3600.0, 30 * 24 * 3600.0
EXAMPLES = """\b
examples:
  fdd export --load checkpoints/student --hf-out student
  fdd export --load checkpoints/student --hf-out student --dtype bfloat16 \\
      --hf-config Llama-3.2-1B --tokenizer Llama-3.2-1B
  fdd export --load checkpoints/student --hf-out exports --watch
      (every checkpoint of a running training, to exports/iter_NNNNNNN)
  torchrun --nproc-per-node 4 -m megatron_fdd export --load checkpoints/student --hf-out student
      (four processes write the files)"""


@click.command("export", cls=Command, epilog=EXAMPLES)
@click.option("--load", type=conversion.FOLDER, required=True, help="Megatron checkpoint folder.")
@click.option(
    "--hf-out", type=conversion.FOLDER, required=True, help="New folder for the Hugging Face model."
)
@click.option(
    "--hf-config",
    type=conversion.FOLDER,
    help="config.json (or a folder with one) of a model of the same family, for what Megatron does not keep.",
)
@click.option("--tokenizer", type=conversion.FOLDER, help="Folder with the tokenizer's files.")
@conversion.dtype
@conversion.max_shard_size
@click.option("--ckpt-step", type=click.IntRange(min=1), help="Iteration to take (default: the newest).")
@click.option(
    "--quantised",
    is_flag=True,
    help="Write the codes and scales of the quantised folder that was imported; a training must not have changed it.",
)
@click.option(
    "--watch",
    is_flag=True,
    help="Export each checkpoint of a running training to HF_OUT/iter_NNNNNNN when its save has ended, until the "
    "training has made its last step. What is there already is skipped.",
)
@click.option(
    "--idle-timeout",
    type=click.FloatRange(min=0, min_open=True, max=_LONGEST_S),
    metavar="SECONDS",
    help=f"With --watch: end when there was no new checkpoint for so long.  [default: {_IDLE_S:g}]",
)
@skip_checksums
@plugin
@trust_checkpoint
def command(
    load: Path, hf_out: Path, *, watch: bool, idle_timeout: float | None, **options: Unpack[ExportOptions]
) -> None:
    """Write the model of a Megatron torch_dist checkpoint as a Hugging Face folder that AutoModelForCausalLM and
    AutoTokenizer load.

    The latest iteration is taken, whatever parallel layout saved it; optimizer states are not read. The shape of the
    model comes from the checkpoint; token ids, generation config and tokenizer come from the folders hf/ and
    tokenizer/ beside it, which `fdd import` wrote, or from the checkpoint that the training run started from. The
    folder appears under its name only when it is complete; checksums.json in it lists a checksum of every tensor, and
    the last line says how many are bit for bit those that were imported.

    One process holds 128 MiB of tensors at a time, or one that is larger, whatever the size of the model. Under
    torchrun, with any number of processes on any number of nodes that share the file system, the files are written
    side by side; they are the same for any number of processes.

    README.md in the folder is a model card: what the checkpoint, the training's data sets and an evaluation of these
    weights say, and fields to fill in.
    """

    options["progress"] = True
    if watch:
        if options.get("ckpt_step") is not None:
            raise click.UsageError(
                f"--ckpt-step {options['ckpt_step']}: --watch exports every iteration; leave one of them out"
            )
        conversion.convert(partial(_watch, load, hf_out, idle_timeout or _IDLE_S, options))
    if idle_timeout is not None:
        raise click.UsageError(
            f"--idle-timeout {idle_timeout:g}: is for --watch; give it too, or leave this out"
        )
    conversion.convert(partial(_export, load, hf_out, options))


def _export(load: Path, hf_out: Path, options: ExportOptions) -> str:
    from megatron_fdd.convert import mcore_to_hf

    return told_of(load, hf_out, mcore_to_hf(load, hf_out, **options))


def _watch(load: Path, hf_out: Path, idle_s: float, options: ExportOptions) -> str:
    from megatron_fdd.convert.watch import watch
    from megatron_fdd.host import console

    place = f"{load}" if load.is_dir() else f"{load}, which is not there yet"
    console.say(f"watching {place}: new checkpoints go to {hf_out}/; Ctrl-C ends this, and loses nothing")
    return watch(
        load, hf_out, idle_s, lambda place, exported: console.say(told_of(load, place, exported)), options
    )


def told_of(load: Path, hf_out: Path, exported: Exported) -> str:
    """Return what is said of an export."""
    line = f"{hf_out}: {exported.num_tensors} tensors of {load}, "
    if exported.loads_as:
        line += f'which transformers loads once config.json has "model_type": "{exported.loads_as}" and no "auto_map"'
    else:
        line += "ready for from_pretrained"
    if exported.unchanged is not None:
        line += f"; {exported.unchanged} are bit for bit those imported"
    if exported.left_out:
        names = f"{exported.left_out[0]} ..."
        line += f"; {len(exported.left_out)} that terms of the distillation learned are left out ({names})"
    return f"{exported.remark}\n{line}" if exported.remark else line
