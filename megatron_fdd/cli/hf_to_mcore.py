"""`fdd import`: from a Hugging Face model folder to a Megatron checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from megatron_fdd.cli import conversion
from megatron_fdd.cli.command import Command, plugin

if TYPE_CHECKING:
    from megatron_fdd.convert.to_mcore import Imported

# More than Megatron's 128 times the tensor parallel size of any run.
MOST_PADDING = 65536
EXAMPLES = """\b
examples:
  fdd import --hf-model Llama-3.2-1B --save checkpoints/teacher
  torchrun --nproc-per-node 4 -m megatron_fdd import --hf-model Llama-3.1-70B --save checkpoints/teacher
      (each of the 4 processes converts a quarter of the weights)
  fdd import --hf-model Qwen3-235B-A22B --save plan/teacher --config-only"""


@click.command("import", cls=Command, epilog=EXAMPLES)
@click.option(
    "--hf-model", type=conversion.FOLDER, required=True, help="Folder with config.json and safetensors."
)
@click.option("--save", type=conversion.FOLDER, required=True, help="New folder for the Megatron checkpoint.")
@conversion.dtype
@click.option(
    "--make-vocab-size-divisible-by",
    "vocabulary_divisor",
    type=click.IntRange(1, MOST_PADDING),
    default=128,
    show_default=True,
    metavar="N",
    help="Pad the vocabulary to a multiple of N. Training with --use-checkpoint-args keeps the padded size, so its "
    "tensor parallel size must divide it: for 3 or 6, give 384.",
)
@click.option(
    "--keep-mtp",
    is_flag=True,
    help="Keep the layers of multi-token prediction, which are left out, beside the checkpoint for `fdd export`.",
)
@plugin
@click.option("--config-only", is_flag=True, help="A checkpoint without weights, for `fdd plan` alone.")
def command(
    hf_model: Path, save: Path, dtype: str, vocabulary_divisor: int, keep_mtp: bool, config_only: bool
) -> None:
    """Write a Hugging Face model (docs/conversion.md lists the families) as an ordinary Megatron torch_dist checkpoint.

    Give a student's folder as --pretrained-checkpoint and a teacher's as --teacher-load; --load and --save name the
    folder of the run, from which the same command continues. The checkpoint loads at every tensor, pipeline and data
    parallel layout. Its args describe the whole model, so --use-checkpoint-args can build it. Configs and tokenizer
    are kept beside the weights (hf/, tokenizer/) for the way back and for comparing teacher and student, with the
    checksum of every tensor (hf/checksums.json). Where the model folder has a checksums.json, its tensors must agree.

    One process holds 128 MiB of tensors at a time, or one that is larger, whatever the size of the model. Under
    torchrun, with any number of processes on any number of nodes that share the file system, they read and write
    side by side.

    With --config-only no weights are read or written, so the model folder needs only config.json: enough for `fdd
    plan` to tell what a run would take before the weights are downloaded. A run refuses such a checkpoint.
    """

    def action() -> str:
        from megatron_fdd.convert import config_to_mcore, hf_to_mcore

        if config_only:
            config_to_mcore(hf_model, save, dtype=dtype, vocabulary_divisor=vocabulary_divisor)
            return f"{save}: the arguments of {hf_model} without weights, for fdd plan"
        imported = hf_to_mcore(
            hf_model,
            save,
            dtype=dtype,
            vocabulary_divisor=vocabulary_divisor,
            progress=True,
            keep_left_out=keep_mtp,
        )
        return told_of(imported, hf_model, save, keep_mtp=keep_mtp)

    conversion.convert(action)


def told_of(imported: Imported, hf_model: Path, save: Path, *, keep_mtp: bool) -> str:
    """Return what people are told of an import."""
    from megatron_fdd.data.tokenizer_identity import has_tokenizer

    lines = []
    if imported.left_out:
        names = f"{len(imported.left_out)} tensors of {imported.left_out_are} ({imported.left_out[0]} ...)"
        lines.append(f"{names} are {'kept beside the checkpoint' if imported.left_out_kept else 'left out'}")
    elif keep_mtp:
        lines.append(f"--keep-mtp kept nothing: {hf_model} has no layers of multi-token prediction")
    if not has_tokenizer(hf_model):
        lines.append(
            f"{hf_model} has no tokenizer: give one to fdd prepare (--tokenizer-model) and fdd export (--tokenizer)"
        )
    lines.append(
        f"{save}: {imported.num_parameters:,} parameters of {hf_model}; a student: --pretrained-checkpoint {save}, "
        f"a teacher: --teacher-load {save}"
    )
    return "\n".join(lines)
