"""Prepare training data: plain text, JSONL or instructions to Megatron's indexed format.

    python tools/prepare_data.py --input docs/*.txt --output-prefix data/docs --split 95,5 \\
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model models/teacher --append-eod --workers 8

writes data/docs_train and data/docs_valid for `--train-data-path` and `--valid-data-path`.
Instructions are JSONL with `prompt` and `response`, or a chat in `messages`; the prompt is masked out of the
loss, and training recognises such a set by itself. Published instruction sets are read as they are when a
template is named, the same one that `tools/evaluate.py` then asks with:

    python tools/prepare_data.py --input databricks-dolly-15k.jsonl --template alpaca --output-prefix data/dolly ...
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_fdd.data.documents import JsonKeys, detect_format
from megatron_fdd.data.encode import EncodeSettings
from megatron_fdd.data.instructions import TEMPLATES, known_layouts
from megatron_fdd.data.prepare import PrepareSettings, prepare
from megatron_fdd.data.tokenizer import TOKENIZER_TYPES, TokenizerSettings


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="FILE")
    add("--output-prefix", required=True, help="path and first part of the names of the files to write")
    add("--tokenizer-type", required=True, choices=TOKENIZER_TYPES, help="as in the training run")
    add("--tokenizer-model", required=True, help="as in the training run: folder or file of the tokenizer")
    add(
        "--format",
        choices=("auto", "text", "jsonl", "instruction"),
        default="auto",
        help="auto: from the files",
    )
    add(
        "--document-separator",
        default="file",
        metavar="{file,blank-line,LINE}",
        help="text: each file is one document; or blank lines end one; or a line that equals LINE does",
    )
    add("--json-key", default="text", help="jsonl: the field with the text")
    add("--prompt-key", default="prompt", help="instruction: the field with the prompt")
    add("--response-key", default="response", help="instruction: the field with the response")
    add("--chat-template", metavar="FILE", help="a jinja template that replaces the tokenizer's own")
    add(
        "--template",
        choices=TEMPLATES,
        help="instruction: how to put records without a ready prompt: Alpaca's text, the tokenizer's chat "
        f"template, or nothing around it. Recognised by their fields: {known_layouts()}",
    )
    add("--append-eod", action="store_true", help="end each text document with the end-of-document token")
    add(
        "--seq-length",
        type=int,
        help="instruction: cut what is longer than a sample of this length, on the right",
    )
    add(
        "--split",
        metavar="TRAIN,VALID[,TEST]",
        help="shares of the documents: writes PREFIX_train, PREFIX_valid, ...",
    )
    add("--workers", type=int, default=1, help="processes that tokenise")
    return parser.parse_args(arguments)


def settings_from(arguments: argparse.Namespace) -> PrepareSettings:
    """The settings that a command line means.

    Raises:
        ValueError: a value that cannot be read.
    """
    keys = JsonKeys(arguments.json_key, arguments.prompt_key, arguments.response_key)
    template = Path(arguments.chat_template).read_text("utf-8") if arguments.chat_template else None
    try:
        split = tuple(float(share) for share in arguments.split.split(",")) if arguments.split else ()
    except ValueError as error:
        raise ValueError(f"--split {arguments.split}: give numbers with commas, for example 95,5") from error
    encode = EncodeSettings(
        tokenizer=TokenizerSettings(arguments.tokenizer_type, arguments.tokenizer_model, template),
        format=detect_format(arguments.input, keys, has_template=arguments.template is not None)
        if arguments.format == "auto"
        else arguments.format,
        keys=keys,
        append_eod=arguments.append_eod,
        seq_length=arguments.seq_length,
        template=arguments.template,
    )
    return PrepareSettings(
        inputs=tuple(arguments.input),
        output_prefix=arguments.output_prefix,
        encode=encode,
        separator=arguments.document_separator,
        split=split,
        workers=arguments.workers,
    )


def main() -> int:
    """Parse, prepare, say what was written."""
    arguments = parse_arguments()
    try:
        summary = prepare(settings_from(arguments))
    except (ValueError, OSError) as error:
        print(f"prepare_data: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("prepare_data: interrupted, nothing written", file=sys.stderr)
        return 130
    print(
        f"{', '.join(summary.prefixes)}: {summary.documents} documents, {summary.tokens} tokens "
        f"({summary.skipped} skipped, {summary.truncated} truncated) in {summary.seconds:.1f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
