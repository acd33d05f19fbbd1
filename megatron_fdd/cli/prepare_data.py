"""`fdd prepare`: from plain text, JSON lines or instructions to Megatron's indexed format."""

from __future__ import annotations

import datetime
import sys
from typing import TYPE_CHECKING, Any

import click

from megatron_fdd.cli.chat_options import CHAT_TEMPLATE, with_options
from megatron_fdd.cli.command import Command
from megatron_fdd.data.documents import JsonKeys, detect_format, expand_inputs
from megatron_fdd.data.instructions import TEMPLATES, known_layouts
from megatron_fdd.data.tokenizer import TOKENIZER_TYPES
from megatron_fdd.data.vanished import FIELDS
from megatron_fdd.host.disk import explain
from megatron_fdd.host.process import status_after

if TYPE_CHECKING:
    from megatron_fdd.data.chat_template import ChatSettings
    from megatron_fdd.data.prepare import PrepareSettings

EXAMPLES = """\b
examples:
  fdd prepare docs/*.txt --output-prefix data/docs --split 95,5 --append-eod --workers 8 \\
      --tokenizer-type HuggingFaceTokenizer --tokenizer-model teacher-hf
      (writes data/docs_train and data/docs_valid, for --train-data-path and --valid-data-path)
  fdd prepare databricks-dolly-15k.jsonl --template alpaca --output-prefix data/dolly \\
      --tokenizer-type HuggingFaceTokenizer --tokenizer-model teacher-hf"""


@click.command(
    "prepare",
    cls=Command,
    free_texts=(
        *(
            "document_separator",
            "json_key",
            "prompt_key",
            "response_key",
            "chat_template_kwargs",
            "eod_token",
        ),
    ),
    epilog=EXAMPLES,
)
@click.argument("files", nargs=-1, metavar="[FILE|FOLDER]...")
@click.option(
    "--input", "more_files", multiple=True, metavar="FILE", help="One more file or folder, repeatable."
)
@click.option(
    "--output-prefix", help="Path and first part of the names of the files to write; not needed with --show."
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
    help="auto: by the first bytes of the files and the fields of their first record.",
)
@click.option(
    "--document-separator",
    default="file",
    show_default=True,
    metavar="{file,blank-line,LINE}",
    help="For text: each file is one document; or blank lines end a document; or a line that equals LINE does.",
)
@click.option("--json-key", default="text", show_default=True, help="For jsonl: the field with the text.")
@click.option(
    "--prompt-key", default="prompt", show_default=True, help="For instructions: the field with the prompt."
)
@click.option(
    "--response-key",
    default="response",
    show_default=True,
    help="For instructions: the field with the response. `chosen`: the better answer of a preference set, also a chat.",
)
@with_options(*CHAT_TEMPLATE)
@click.option(
    "--chat-turns",
    type=click.Choice(["all", "last"]),
    default="all",
    show_default=True,
    help="Learn all answers of a conversation, or only its last one.",
)
@click.option(
    "--allow-dropped",
    metavar="FIELD,...",
    help=f"Accept that the chat template does not write these parts: {', '.join(FIELDS)}.",
)
@click.option(
    "--skip-refused",
    is_flag=True,
    help="Leave out records that cannot be used, and count them by reason; without it the first one ends the run.",
)
@click.option(
    "--template",
    type=click.Choice(TEMPLATES),
    help="For instructions without a ready prompt: put Alpaca's text, the tokenizer's chat template, or nothing "
    f"around them. Their fields tell the layout: {known_layouts()}.",
)
@click.option("--append-eod", is_flag=True, help="End each text document with the end-of-document token.")
@click.option(
    "--eod-token",
    metavar="TOKEN",
    help="Token of the vocabulary that ends documents and responses, in place of the tokenizer's end of sequence.",
)
@click.option(
    "--seq-length",
    type=int,
    help="For instructions: cut a record that is longer than a sample of this length, on the right.",
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
    help="Processes that tokenise; at most one for each 4 MB of input is started.",
)
@click.option(
    "--show",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Print the first N samples, with the learned text in colour. With --output-prefix also write a page, "
    "PREFIX.samples.html; without it do nothing else.",
)
@click.option("--overwrite", is_flag=True, help="Replace sets of the same names.")
def command(files: tuple[str, ...], more_files: tuple[str, ...], **given: Any) -> None:
    """Prepare training data: from plain text, JSON lines or instructions to Megatron's indexed format.

    Files are JSON lines, JSON arrays, parquet or text, plain or compressed with gzip or zstd; for a folder, all data
    below it is read. Instructions are records with `prompt` and `response`, or chats in one of the published layouts
    (`messages`, ShareGPT's `conversations` and others); the prompt is masked out of the loss, and training recognises
    such a set by itself. Published instruction sets can be read directly if --template is given; `fdd evaluate` must
    then ask with the same template.
    """
    inputs = (*more_files, *files)
    if not inputs:
        raise click.UsageError("no input: name at least one file")
    if given["output_prefix"] is None and not given["show"]:
        raise click.UsageError("--output-prefix is missing; or look at samples first with --show 5")
    from megatron_fdd.data.parts import kept_documents
    from megatron_fdd.data.prepare import look, prepare
    from megatron_fdd.data.show import shown
    from megatron_fdd.data.summary import refusal_lines

    try:
        settings = settings_from(inputs, **given)
        if settings.show:
            tokenizer, samples, seen = look(settings)
            lines = [*shown(tokenizer, samples, in_colour=sys.stdout.isatty()), *refusal_lines(seen)]
            print(*lines, sep="\n")
        if not settings.output_prefix:
            return
        summary = prepare(settings)
    except (ValueError, OSError) as error:
        print(f"prepare_data: error: {explain(error)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as interrupt:
        kept = kept_documents(given["output_prefix"] or "")
        how = f"the same command continues after {kept:,} documents" if kept else "nothing written"
        print(f"prepare_data: interrupted, {how}", file=sys.stderr)
        sys.exit(status_after(interrupt))
    print(*summary.lines(), sep="\n")


def settings_from(inputs: tuple[str, ...], **given: Any) -> PrepareSettings:
    """Return the settings that a command line means: values of the options by name.

    Raises:
        ValueError: a value cannot be read.
    """
    from megatron_fdd.data.encode import EncodeSettings
    from megatron_fdd.data.prepare import PrepareSettings
    from megatron_fdd.data.tokenizer import TokenizerSettings

    inputs = expand_inputs(inputs)
    keys = JsonKeys(given["json_key"], given["prompt_key"], given["response_key"])
    split = given["split"]
    try:
        shares = tuple(float(share) for share in split.split(",")) if split else ()
    except ValueError as error:
        raise ValueError(f"--split {split}: give numbers with commas, for example 95,5") from error
    layout = given["layout"]
    if layout == "auto":
        layout = detect_format(inputs, keys, has_template=given["template"] is not None)
    encode = EncodeSettings(
        tokenizer=TokenizerSettings(
            given["tokenizer_type"],
            given["tokenizer_model"],
            None if given["chat_template"] is None else given["chat_template"].text,
            given["eod_token"],
        ),
        format=layout,
        keys=keys,
        append_eod=given["append_eod"],
        seq_length=given["seq_length"],
        template=given["template"],
        chat=_chat_settings(**given),
    )
    return PrepareSettings(
        inputs=inputs,
        output_prefix=given["output_prefix"] or "",
        encode=encode,
        separator=given["document_separator"],
        split=shares,
        workers=given["workers"],
        overwrite=given["overwrite"],
        skip_refused=given["skip_refused"],
        show=given["show"],
    )


def _chat_settings(**given: Any) -> ChatSettings:
    from megatron_fdd.data.chat_template import ChatSettings

    allowed = frozenset(filter(None, (given["allow_dropped"] or "").split(",")))
    unknown = sorted(allowed - set(FIELDS))
    if unknown:
        raise ValueError(f"--allow-dropped {', '.join(unknown)}: must be among {', '.join(FIELDS)}")
    date = given["chat_date"] or datetime.date.today()
    template = given["chat_template"]
    place = f"of {given['tokenizer_model']}" if template is None else template.path
    return ChatSettings(given["chat_template_kwargs"], date, given["chat_turns"], allowed, place)
