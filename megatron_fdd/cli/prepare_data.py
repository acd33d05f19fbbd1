"""`fdd prepare`: plain text, JSON lines or instructions to Megatron's indexed format."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from megatron_fdd.data.documents import JsonKeys, detect_format
from megatron_fdd.data.instructions import TEMPLATES, known_layouts
from megatron_fdd.data.tokenizer import TOKENIZER_TYPES

if TYPE_CHECKING:
    from megatron_fdd.data.prepare import PrepareSettings

EXAMPLES = """\b
examples:
  fdd prepare docs/*.txt --output-prefix data/docs --split 95,5 --append-eod --workers 8 \\
      --tokenizer-type HuggingFaceTokenizer --tokenizer-model teacher-hf
      (writes data/docs_train and data/docs_valid, for --train-data-path and --valid-data-path)
  fdd prepare databricks-dolly-15k.jsonl --template alpaca --output-prefix data/dolly \\
      --tokenizer-type HuggingFaceTokenizer --tokenizer-model teacher-hf"""


@click.command("prepare", epilog=EXAMPLES)
@click.argument("files", nargs=-1, metavar="[FILE]...")
@click.option("--input", "more_files", multiple=True, metavar="FILE", help="One more file, repeatable.")
@click.option(
    "--output-prefix", required=True, help="Path and first part of the names of the files to write."
)
@click.option(
    "--tokenizer-type", required=True, type=click.Choice(TOKENIZER_TYPES), help="As in the training run."
)
@click.option(
    "--tokenizer-model", required=True, help="As in the training run: folder or file of the tokenizer."
)
@click.option(
    "--format",
    "layout",
    type=click.Choice(["auto", "text", "jsonl", "instruction"]),
    default="auto",
    show_default=True,
    help="auto: by the files.",
)
@click.option(
    "--document-separator",
    default="file",
    show_default=True,
    metavar="{file,blank-line,LINE}",
    help="text: each file is one document; or blank lines end one; or a line that equals LINE does.",
)
@click.option("--json-key", default="text", show_default=True, help="jsonl: the field with the text.")
@click.option(
    "--prompt-key", default="prompt", show_default=True, help="instruction: the field with the prompt."
)
@click.option(
    "--response-key", default="response", show_default=True, help="instruction: the field with the response."
)
@click.option("--chat-template", metavar="FILE", help="A jinja template that replaces the tokenizer's own.")
@click.option(
    "--template",
    type=click.Choice(TEMPLATES),
    help="instruction: how to put records without a ready prompt: Alpaca's text, the tokenizer's chat template, or "
    f"nothing around it. Recognised by their fields: {known_layouts()}.",
)
@click.option("--append-eod", is_flag=True, help="End each text document with the end-of-document token.")
@click.option(
    "--seq-length",
    type=int,
    help="instruction: cut what is longer than a sample of this length, on the right.",
)
@click.option(
    "--split",
    metavar="TRAIN,VALID[,TEST]",
    help="Shares of the documents: writes PREFIX_train, PREFIX_valid, ...",
)
@click.option(
    "--workers",
    type=int,
    default=1,
    show_default=True,
    help="Processes that tokenise, at most: one for each 4 MB of input.",
)
@click.option("--overwrite", is_flag=True, help="Replace sets of the same names.")
def command(files: tuple[str, ...], more_files: tuple[str, ...], **given: Any) -> None:
    """Prepare training data: plain text, JSON lines or instructions to Megatron's indexed format.

    Instructions are JSON lines with `prompt` and `response`, or a chat in `messages`; the prompt is masked out of the
    loss, and training recognises such a set by itself. Published instruction sets are read as they are when a
    --template is named, the same one that `fdd evaluate` then asks with.
    """
    inputs = (*more_files, *files)
    if not inputs:
        raise click.UsageError("no input: name one file or more")
    from megatron_fdd.data.prepare import prepare

    try:
        summary = prepare(settings_from(inputs, **given))
    except (ValueError, OSError) as error:
        print(f"prepare_data: error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("prepare_data: interrupted, nothing written", file=sys.stderr)
        sys.exit(130)
    print(
        f"{', '.join(summary.prefixes)}: {summary.documents} documents, {summary.tokens} tokens "
        f"({summary.skipped} skipped, {summary.truncated} truncated) in {summary.seconds:.1f} s"
    )


def settings_from(inputs: tuple[str, ...], **given: Any) -> PrepareSettings:
    """The settings that a command line means: values of the options by name.

    Raises:
        ValueError: a value that cannot be read.
    """
    from megatron_fdd.data.encode import EncodeSettings
    from megatron_fdd.data.prepare import PrepareSettings
    from megatron_fdd.data.tokenizer import TokenizerSettings

    keys = JsonKeys(given["json_key"], given["prompt_key"], given["response_key"])
    chat_template = Path(given["chat_template"]).read_text("utf-8") if given["chat_template"] else None
    split = given["split"]
    try:
        shares = tuple(float(share) for share in split.split(",")) if split else ()
    except ValueError as error:
        raise ValueError(f"--split {split}: give numbers with commas, for example 95,5") from error
    layout = given["layout"]
    if layout == "auto":
        layout = detect_format(inputs, keys, has_template=given["template"] is not None)
    encode = EncodeSettings(
        tokenizer=TokenizerSettings(given["tokenizer_type"], given["tokenizer_model"], chat_template),
        format=layout,
        keys=keys,
        append_eod=given["append_eod"],
        seq_length=given["seq_length"],
        template=given["template"],
    )
    return PrepareSettings(
        inputs=inputs,
        output_prefix=given["output_prefix"],
        encode=encode,
        separator=given["document_separator"],
        split=shares,
        workers=given["workers"],
        overwrite=given["overwrite"],
    )
