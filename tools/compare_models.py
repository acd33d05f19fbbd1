"""Perplexity, KL to the teacher and a sample of Hugging Face models on one text.

python tools/compare_models.py --teacher DIR --student NAME=DIR [--student NAME=DIR ...] \\
    --validation-text FILE.jsonl --training-text FILE.jsonl [--json-out FILE]
"""

import argparse
import dataclasses
import json
from pathlib import Path

import torch
from transformers.utils import logging

from megatron_fdd.evaluate.comparison import Text, compare


def named_folder(value: str) -> tuple[str, Path]:
    """NAME=DIR."""
    name, separator, folder = value.partition("=")
    if not (name and separator and folder):
        raise argparse.ArgumentTypeError(f"{value!r} is not NAME=DIR")
    return name, Path(folder)


def main() -> None:
    """Parse the command line, compare, print the table."""
    defaults = {field.name: field.default for field in dataclasses.fields(Text)}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--teacher", type=Path, required=True, help="Hugging Face folder")
    add("--student", type=named_folder, action="append", default=[], help="NAME=DIR, repeatable")
    add("--validation-text", type=Path, required=True, help='JSONL, {"text": ...} a line')
    add("--training-text", type=Path, required=True, help="JSONL, for the unigram model")
    add("--length", type=int, default=defaults["length"], help="tokens in a window")
    add("--max-tokens", type=int, default=defaults["max_tokens"], help="scored at most")
    add("--prompt", default=defaults["prompt"], help="what every model continues")
    add("--sample-tokens", type=int, default=defaults["num_sample_tokens"])
    add("--threads", type=int, help="of torch (default: torch's own choice)")
    add("--json-out", type=Path, help="write the numbers here too")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    text = Text(
        validation=arguments.validation_text,
        training=arguments.training_text,
        length=arguments.length,
        max_tokens=arguments.max_tokens,
        prompt=arguments.prompt,
        num_sample_tokens=arguments.sample_tokens,
    )
    try:
        comparison = compare(arguments.teacher, dict(arguments.student), text)
    except ValueError as error:
        parser.error(str(error))
    if arguments.json_out:
        arguments.json_out.write_text(json.dumps(comparison.as_json(), indent=1) + "\n", encoding="utf-8")
    print(comparison.table())


if __name__ == "__main__":
    main()
