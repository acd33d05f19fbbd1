"""`fdd export`: from a Megatron checkpoint to a Hugging Face model folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import click

from megatron_fdd.cli import conversion
from megatron_fdd.cli.command import Command, plugin, skip_checksums, trust_checkpoint

if TYPE_CHECKING:
    from megatron_fdd.convert.to_hf import ExportOptions

EXAMPLES = """\b
examples:
  fdd export --load checkpoints/student --hf-out student
  fdd export --load checkpoints/student --hf-out student --dtype bfloat16 \\
      --hf-config Llama-3.2-1B --tokenizer Llama-3.2-1B
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
@skip_checksums
@plugin
@trust_checkpoint
def command(load: Path, hf_out: Path, **options: Unpack[ExportOptions]) -> None:
    """Write the model of a Megatron torch_dist checkpoint as a Hugging Face folder that AutoModelForCausalLM and
    AutoTokenizer load.

    The latest iteration is taken, whatever parallel layout saved it; optimizer states are not read. The shape of the
    model comes from the checkpoint; token ids, generation config and tokenizer come from the folders hf/ and
    tokenizer/ beside it, which `fdd import` wrote, or from the checkpoint that the training run started from. The
    folder appears under its name only when it is complete; checksums.json in it lists the SHA-256 of every tensor, and
    the last line says how many are bit for bit those that were imported.

    One process holds one tensor at a time, whatever the size of the model. Under torchrun, with any number of
    processes on any number of nodes that share the file system, the files are written side by side; they are the same
    for any number of processes.
    """

    def action() -> str:
        from megatron_fdd.convert import mcore_to_hf

        options["progress"] = True
        exported = mcore_to_hf(load, hf_out, **options)
        line = f"{hf_out}: {exported.num_tensors} tensors of {load}, ready for from_pretrained"
        if exported.unchanged is not None:
            line += f"; {exported.unchanged} are bit for bit those imported"
        if exported.left_out:
            names = f"{exported.left_out[0]} ..."
            line += (
                f"; {len(exported.left_out)} that terms of the distillation learned are left out ({names})"
            )
        return f"{exported.remark}\n{line}" if exported.remark else line

    conversion.convert(action)
