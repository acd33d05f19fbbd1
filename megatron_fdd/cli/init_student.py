"""`fdd student`: a student model folder from chosen layers of a teacher."""

from __future__ import annotations

from pathlib import Path

import click

from megatron_fdd.cli import conversion
from megatron_fdd.cli.command import Command, plugin

EXAMPLES = """\b
examples:
  fdd student --hf-model SmolLM2-135M --num-layers 15 --hf-out student
      (keeps 0-3,6,9,12,15,17,20,23,26-29)
  fdd student --hf-model SmolLM2-135M --layers 0-3,8,16,24,26-29 --hf-out student"""


@click.command("student", cls=Command, epilog=EXAMPLES)
@click.option("--hf-model", type=conversion.FOLDER, required=True, help="The teacher's folder.")
@click.option("--hf-out", type=conversion.FOLDER, required=True, help="New folder for the student.")
@click.option("--layers", metavar="LIST", help="0-based layers and ranges, increasing: 0-3,8,26-29.")
@click.option("--num-layers", type=int, metavar="N", help="Number of layers; the rule above chooses which.")
@conversion.max_shard_size
@plugin
def command(
    hf_model: Path, hf_out: Path, layers: str | None, num_layers: int | None, max_shard_size: str
) -> None:
    """Write a Hugging Face model that keeps only some layers of another; give either --layers or --num-layers.

    Embeddings, final norm, head, config, generation config and tokenizer are carried over; num_hidden_layers
    changes.

    The first and last layers matter most: with --num-layers N of at least 8, the first four, the last four and N - 8
    layers spread evenly between them are kept; with fewer, N layers spread evenly from the first to the last.
    """
    if (layers is None) == (num_layers is None):
        raise click.UsageError("give one of --layers and --num-layers")

    def action() -> str:
        from megatron_fdd import convert

        teacher_layers = convert.count_layers(hf_model)
        if layers is not None:
            chosen = convert.parse_layers(layers, teacher_layers)
        else:
            assert num_layers is not None
            chosen = convert.choose_layers(num_layers, teacher_layers)
        parameters = convert.init_student(
            hf_model, chosen, hf_out, max_shard_size=max_shard_size, progress=True
        )
        kept = ",".join(str(layer) for layer in chosen)
        return f"{hf_out}: {parameters:,} parameters, {len(chosen)} layers of {hf_model}: {kept}"

    conversion.convert(action)
