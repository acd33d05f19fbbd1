"""A student model folder out of a teacher's chosen layers."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_fdd.convert.command_line import run_tool, teaching_parser

DESCRIPTION = """\
Write a Hugging Face model that keeps only some layers of another. Embeddings, final norm, head, config,
generation config and tokenizer are carried over; num_hidden_layers changes.

The first and last layers matter most: with --num-layers N of at least 8 the first four, the last four and N - 8
spread evenly between them are kept; with fewer, N spread evenly from the first to the last."""
EXAMPLES = """\
  python tools/init_student.py --hf-model SmolLM2-135M --num-layers 15 --hf-out student
      (keeps 0-3,6,9,12,15,17,20,23,26-29)
  python tools/init_student.py --hf-model SmolLM2-135M --layers 0-3,8,16,24,26-29 --hf-out student"""


def main(argv: list[str] | None = None) -> int:
    """Parse, write the student, print one line; returns the exit status."""
    parser = teaching_parser(DESCRIPTION, EXAMPLES)
    parser.add_argument("--hf-model", type=Path, required=True, help="the teacher's folder")
    parser.add_argument("--hf-out", type=Path, required=True, help="new folder for the student")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--layers", metavar="LIST", help="0-based layers and ranges, increasing: 0-3,8,26-29")
    which.add_argument("--num-layers", type=int, metavar="N", help="how many; the rule above chooses which")
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="such as 5GB or 500MB (default 5GB)"
    )
    args = parser.parse_args(argv)

    def action() -> str:
        from megatron_fdd import convert

        layers = (
            convert.parse_layers(args.layers)
            if args.layers
            else convert.choose_layers(args.num_layers, convert.count_layers(args.hf_model))
        )
        parameters = convert.init_student(
            args.hf_model, layers, args.hf_out, max_shard_size=args.max_shard_size, progress=True
        )
        kept = ",".join(str(layer) for layer in layers)
        return f"{args.hf_out}: {parameters:,} parameters, {len(layers)} layers of {args.hf_model}: {kept}"

    return run_tool(action)


if __name__ == "__main__":
    sys.exit(main())
