"""`fdd student`: a student model folder, from chosen layers of a teacher or with another model's vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from megatron_fdd.cli import conversion
from megatron_fdd.cli.command import Command, plugin
from megatron_fdd.host.console import complain

if TYPE_CHECKING:
    from megatron_fdd.convert.new_vocabulary import NewVocabulary

EXAMPLES = """\b
examples:
  fdd student --hf-model SmolLM2-135M --num-layers 15 --hf-out student
      (keeps 0-3,6,9,12,15,17,20,23,26-29)
  fdd student --hf-model SmolLM2-135M --layers 0-3,8,16,24,26-29 --hf-out student
  fdd student --from Qwen3-0.6B --vocabulary-of Llama-3.3-70B --hf-out student"""


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
    help='With --vocabulary-of: JSON lines with "text" to compare both models on, 32 pieces of 1,000 characters at '
    "most; default: a short built-in text.",
)
@click.option("--no-score", is_flag=True, help="With --vocabulary-of: do not run the models.")
@conversion.max_shard_size
@plugin
def command(hf_model: Path, hf_out: Path, max_shard_size: str, **given: Any) -> None:
    """Write a Hugging Face model with some of another one's layers, or with the vocabulary of a third; give one of
    --layers, --num-layers and --vocabulary-of.

    Layers: embeddings, final norm, head, config, generation config and tokenizer are carried over; num_hidden_layers
    changes. The first and last layers matter most: with --num-layers N of at least 8, the first four, the last four
    and N - 8 layers spread evenly between them are kept; with fewer, N layers spread evenly from the first to the last.

    Vocabulary: tokens that both models have keep their rows of embedding and head, new ones begin halfway between the
    mean of the rows of their old pieces and that of all rows. Tokenizer, chat template and special tokens are the
    teacher's. Bits a byte before and after are printed: what the exchange costs before any training.
    """
    if sum(given[name] is not None for name in ("layers", "num_layers", "vocabulary_of")) != 1:
        raise click.UsageError("give one of --layers, --num-layers and --vocabulary-of")
    if given["vocabulary_of"] is None and (given["no_score"] or given["validation_text"] is not None):
        raise click.UsageError("--validation-text and --no-score are for --vocabulary-of")
    if given["no_score"] and given["validation_text"] is not None:
        raise click.UsageError("give one of --validation-text and --no-score")

    def action() -> str:
        if given["vocabulary_of"] is None:
            return _of_layers(hf_model, hf_out, max_shard_size, given["layers"], given["num_layers"])
        return _of_vocabulary(hf_model, hf_out, max_shard_size, **given)

    conversion.convert(action)


def _of_layers(
    hf_model: Path, hf_out: Path, max_shard_size: str, layers: str | None, num_layers: int | None
) -> str:
    from megatron_fdd import convert

    teacher_layers = convert.count_layers(hf_model)
    if layers is not None:
        chosen = convert.parse_layers(layers, teacher_layers)
    else:
        assert num_layers is not None
        chosen = convert.choose_layers(num_layers, teacher_layers)
    parameters = convert.init_student(hf_model, chosen, hf_out, max_shard_size=max_shard_size, progress=True)
    kept = ",".join(str(layer) for layer in chosen)
    return f"{hf_out}: {parameters:,} parameters, {len(chosen)} layers of {hf_model}: {kept}"


def _of_vocabulary(hf_model: Path, hf_out: Path, max_shard_size: str, **given: Any) -> str:
    from megatron_fdd import convert
    from megatron_fdd.evaluate.bits import SAMPLE
    from megatron_fdd.evaluate.perplexity import read_texts

    teacher, text = given["vocabulary_of"], given["validation_text"]
    texts = [SAMPLE] if text is None else read_texts(text)
    if not texts:
        raise ValueError(f"--validation-text {text}: holds no text; give another")
    vocabulary = convert.replace_vocabulary(
        hf_model, teacher, hf_out, max_shard_size=max_shard_size, progress=True
    )
    lines = [f"{hf_out}: {hf_model} with the vocabulary of {teacher}", _origins(vocabulary)]
    if not given["no_score"]:
        lines += _bits(hf_model, hf_out, texts)
    return "\n".join(lines)


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
