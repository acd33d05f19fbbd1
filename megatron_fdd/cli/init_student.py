"""`fdd student`: a student model folder, from parts of a teacher or with another model's vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from megatron_fdd.cli import conversion, student_of_parts
from megatron_fdd.cli.command import Command, plugin
from megatron_fdd.host.console import complain

if TYPE_CHECKING:
    from megatron_fdd.convert.new_vocabulary import NewVocabulary

EXAMPLES = """\b
examples:
  fdd student --hf-model SmolLM2-135M --num-layers 15 --hf-out student
      (keeps 0-3,6,9,12,15,17,20,23,26-29)
  fdd student --hf-model SmolLM2-135M --layers 0-3,8,16,24,26-29 --hf-out student
  fdd student --hf-model Qwen3-8B --ffn-hidden-size 9216 --calibration-text text.jsonl --hf-out student
  fdd student --hf-model Qwen3-30B-A3B --dense-ffn-hidden-size 6144 --calibration-text text.jsonl \\
      --hf-out student
  fdd student --from Qwen3-0.6B --vocabulary-of Llama-3.3-70B --hf-out student"""

# Sizes of a narrower student, which are Megatron's, and what they are.
_SIZES = {
    "--hidden-size": "Hidden channels that are kept, the same in all layers.",
    "--ffn-hidden-size": "Channels of each MLP that are kept.",
    "--num-attention-heads": "Attention heads that are kept, the same number in each query group.",
    "--num-query-groups": "Query groups (heads of keys and values) that are kept.",
    "--num-experts": "Experts of each layer that are kept.",
    "--moe-ffn-hidden-size": "Channels of each expert that are kept.",
    "--moe-shared-expert-intermediate-size": "Channels of the shared expert that are kept.",
}
_SIZE_NAMES = [flag.removeprefix("--").replace("-", "_") for flag in _SIZES]


def _sizes(function: Any) -> Any:
    """Add the options of a narrower student."""
    for flag in reversed(_SIZES):
        function = click.option(
            flag, type=int, metavar="N", help=f"{_SIZES[flag]} Needs --calibration-text."
        )(function)
    return function


@click.command("student", cls=Command, epilog=EXAMPLES)
@click.option(
    "--hf-model",
    "--from",
    "hf_model",
    type=conversion.FOLDER,
    required=True,
    help="The folder to begin with: a teacher, or with --vocabulary-of a small model of another family.",
)
@click.option("--hf-out", type=conversion.FOLDER, required=True, help="New folder for the student.")
@click.option("--layers", metavar="LIST", help="0-based layers and ranges, increasing: 0-3,8,26-29.")
@click.option("--num-layers", type=int, metavar="N", help="Number of layers; the rule above chooses which.")
@_sizes
@click.option(
    "--dense-ffn-hidden-size",
    type=int,
    metavar="N",
    help="Of a mixture of experts: MLPs of N channels in place of all experts. Needs --calibration-text.",
)
@click.option(
    "--calibration-text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help='JSON lines with "text" on which the teacher runs to find which channels, heads and experts matter.',
)
@click.option(
    "--calibration-samples",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    metavar="N",
    help=f"How many windows of {student_of_parts.WINDOW} tokens it reads, spread over the text.",
)
@click.option(
    "--vocabulary-of",
    type=conversion.FOLDER,
    metavar="TEACHER",
    help="Keep all layers, and take this model's vocabulary: a Hugging Face folder, one with a tokenizer alone, or a "
    "Megatron checkpoint of `fdd import`.",
)
@click.option(
    "--validation-text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help='JSON lines with "text" to compare both models on, 32 pieces of 1,000 characters at most; default: '
    "--calibration-text, else a short built-in text.",
)
@click.option("--no-score", is_flag=True, help="Do not run both models to compare them.")
@conversion.max_shard_size
@plugin
def command(hf_model: Path, hf_out: Path, max_shard_size: str, **given: Any) -> None:
    """Write a Hugging Face model with some of another one's layers, channels and heads, or with the vocabulary of a
    third.

    Layers: embeddings, final norm, head, config, generation config and tokenizer are carried over. The first and last
    layers matter most: with --num-layers N of at least 8, the first four, the last four and N - 8 layers spread evenly
    between them are kept; with fewer, N layers spread evenly from the first to the last.

    Width: what is kept is chosen by the teacher's activations on --calibration-text, and stays bit for bit and in its
    order.

    Dense: in place of a layer's experts comes one MLP of the channels, of all experts together, that do most on
    --calibration-text; the shared expert's come first. Its gate and up are theirs, its down is what brings it nearest
    to the mixture's output on the text. Take as many channels as a token uses, or more, and a text with ten tokens for
    each. The result is of the family's dense type, such as qwen3 of a qwen3_moe.

    Vocabulary: tokens that both models have keep their rows of embedding and head, new ones begin halfway between the
    mean of the rows of their old pieces and that of all rows. Tokenizer, chat template and special tokens are the
    teacher's.

    Bits a byte before and after are printed: what the change costs before any training.
    """
    sizes = {name: given[name] for name in _SIZE_NAMES if given[name] is not None}
    _check_together(sizes, given)

    def action() -> str:
        texts = student_of_parts.read(given["validation_text"] or given["calibration_text"])
        if given["vocabulary_of"] is None:
            line = student_of_parts.write(hf_model, hf_out, max_shard_size, sizes, given)
        else:
            line = _of_vocabulary(hf_model, hf_out, max_shard_size, given["vocabulary_of"])
        return "\n".join([line, *([] if given["no_score"] else _bits(hf_model, hf_out, texts))])

    conversion.convert(action)


def _check_together(sizes: dict[str, int], given: dict[str, Any]) -> None:
    """Refuse options that do not go together."""
    choices = [given[name] is not None for name in ("layers", "num_layers", "vocabulary_of")]
    is_dense = given["dense_ffn_hidden_size"] is not None
    if sum(choices) > 1 or not (any(choices) or sizes or is_dense):
        raise click.UsageError(
            "give one of --layers, --num-layers and --vocabulary-of, or a size such as --hidden-size"
        )
    if (sizes or is_dense) and given["vocabulary_of"] is not None:
        raise click.UsageError(
            "--vocabulary-of keeps all sizes: make the student narrower or dense first, in another call"
        )
    if sizes and is_dense:
        raise click.UsageError(
            "--dense-ffn-hidden-size keeps all other sizes: make the dense student narrower in another call"
        )
    if (bool(sizes) or is_dense) != (given["calibration_text"] is not None):
        raise click.UsageError(
            "a size needs --calibration-text, a text that tells which channels matter"
            if sizes or is_dense
            else "--calibration-text is for a size, such as --hidden-size"
        )
    if given["no_score"] and given["validation_text"] is not None:
        raise click.UsageError("give one of --validation-text and --no-score")


def _of_vocabulary(hf_model: Path, hf_out: Path, max_shard_size: str, teacher: Path) -> str:
    from megatron_fdd import convert

    vocabulary = convert.replace_vocabulary(
        hf_model, teacher, hf_out, max_shard_size=max_shard_size, progress=True
    )
    return f"{hf_out}: {hf_model} with the vocabulary of {teacher}\n{_origins(vocabulary)}"


def _origins(vocabulary: NewVocabulary) -> str:
    """Say where the rows of the new vocabulary come from."""
    return (
        f"{len(vocabulary.origins):,} rows: {vocabulary.num_kept:,} kept, {vocabulary.num_cut:,} made of their old "
        f"pieces, {vocabulary.num_without:,} without pieces"
    )


def _bits(before: Path, after: Path, texts: list[str]) -> list[str]:
    """Score both models; nothing, with a warning, if one cannot be run here."""
    from transformers.utils import logging

    from megatron_fdd.evaluate.bits import compare_bits
    from megatron_fdd.evaluate.models import Placement

    logging.disable_progress_bar()
    placement = Placement(Placement.choose(None, None).device, "auto")
    try:
        scores = compare_bits([before, after], texts, placement)
    except (ValueError, RuntimeError) as error:
        complain(f"warning: {after} is written, and its bits a byte are not known: {error}")
        return []
    told = [f"{score.bits:.3f} ({score.num_tokens:,} tokens)" for score in scores]
    return [
        f"bits a byte, of a text of {scores[0].num_bytes:,} bytes: {told[0]} before, {told[1]} now, without training"
    ]
