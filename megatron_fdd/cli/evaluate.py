"""`fdd evaluate`: what Hugging Face models learned."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from megatron_fdd.cli.chat_options import CHAT_TEMPLATE, with_options
from megatron_fdd.cli.command import Command, few_threads
from megatron_fdd.data.instructions import LAYOUTS, TEMPLATES, known_layouts
from megatron_fdd.data.refusals import Refusal
from megatron_fdd.evaluate.named_path import split_name
from megatron_fdd.evaluate.settings import DEVICES, DTYPES, GenerationSettings, Text
from megatron_fdd.host.disk import explain
from megatron_fdd.host.process import status_after

if TYPE_CHECKING:
    from megatron_fdd.evaluate.request import Request

TEACHER = "teacher"
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
EXAMPLES = """\b
examples:
  fdd evaluate --hf-model fdd=runs/distilled-hf --teacher teacher-hf --data dolly=dolly/valid.jsonl \\
      --data self-inst=user_oriented_instructions.jsonl --out runs/evaluation
  fdd evaluate --hf-model student-hf --teacher teacher-hf --validation-text valid.jsonl"""
_ASKED, _SCORED = GenerationSettings(), Text()


def _named(kind: click.Path) -> Callable[..., tuple[tuple[str, Path], ...]]:
    """Return a callback that reads [NAME=]PATH, repeatable; a path without a name gives its own."""

    def read(ctx: click.Context, option: click.Parameter, values: tuple[str, ...]) -> Any:
        found = []
        for value in values:
            try:
                name, given = split_name(value)
            except ValueError as error:
                raise click.BadParameter(str(error)) from error
            path = Path(str(kind.convert(given, option, ctx)))
            found.append((name or (path.resolve().name if path.is_dir() else path.stem), path))
        return tuple(found)

    return read


def _numbers(_ctx: click.Context, _option: click.Parameter, value: str) -> tuple[int, ...]:
    """Read numbers such as 10,20,30."""
    try:
        return tuple(int(number) for number in value.split(","))
    except ValueError as error:
        raise click.BadParameter(
            f"{value!r}: give whole numbers with commas, for example 10,20,30"
        ) from error


MODELS = (
    click.option(
        "--hf-model",
        callback=_named(FOLDER),
        multiple=True,
        required=True,
        metavar="[NAME=]DIR",
        help="Hugging Face folder of a student (`fdd export` makes one), repeatable.",
    ),
    click.option(
        "--teacher", type=FOLDER, metavar="DIR", help="Evaluated too; distances are measured to it."
    ),
    click.option(
        "--out", type=click.Path(path_type=Path), default=Path("runs/evaluation"), show_default=True
    ),
    click.option("--device", type=click.Choice(DEVICES), help="Default: all visible GPUs, if there are any."),
    click.option("--dtype", type=click.Choice(DTYPES), help="Default: bfloat16 on GPUs, float32 on CPUs."),
    click.option(
        "--threads",
        type=click.IntRange(min=1),
        callback=few_threads,
        help="Threads of torch; default: torch's own choice.",
    ),
)
INSTRUCTIONS = (
    click.option(
        "--data",
        callback=_named(FILE),
        multiple=True,
        metavar="[NAME=]FILE",
        help="JSON lines, repeatable.",
    ),
    click.option(
        "--format",
        "layout",
        type=click.Choice(LAYOUTS),
        help=f"Layout of all files; by default, the fields of the first line tell it: {known_layouts()}.",
    ),
    click.option(
        "--vicuna-answers",
        type=FILE,
        metavar="FILE",
        help="References for Vicuna's questions, in FastChat's form.",
    ),
    click.option(
        "--min-answer-words",
        type=int,
        help="Leave out examples whose first reference has fewer words; default: 11 for s-ni and unni, as MiniLLM "
        "evaluates them, 0 for others.",
    ),
    click.option(
        "--limit", type=int, help="Take the first N examples of each file (MiniLLM: 10000 of unni)."
    ),
    click.option(
        "--template",
        type=click.Choice(TEMPLATES),
        default=_ASKED.template,
        show_default=True,
        help="alpaca: Alpaca's text, except around a ready `prompt`; chat: the tokenizer's template; none: nothing.",
    ),
    *CHAT_TEMPLATE,
    click.option(
        "--seeds",
        default=",".join(map(str, _ASKED.seeds)),
        show_default=True,
        metavar="N,N,...",
        callback=_numbers,
    ),
    click.option(
        "--temperature",
        type=float,
        default=_ASKED.temperature,
        show_default=True,
        help="0: greedy, with one seed only.",
    ),
    click.option("--top-p", type=float, default=_ASKED.top_p, show_default=True),
    click.option(
        "--max-prompt-tokens",
        type=int,
        default=_ASKED.max_prompt_tokens,
        show_default=True,
        help="The end of a longer prompt is cut off.",
    ),
    click.option("--max-new-tokens", type=int, default=_ASKED.max_new_tokens, show_default=True),
    click.option(
        "--batch-size",
        type=int,
        default=32,
        show_default=True,
        help="Prompts at once; may be another when a run continues.",
    ),
)
TEXT = (
    click.option(
        "--validation-text", type=FILE, metavar="FILE", help='JSON lines with "text", for the perplexity.'
    ),
    click.option(
        "--training-text",
        type=FILE,
        metavar="FILE",
        help="Its word frequencies are one more row, which every model should beat.",
    ),
    click.option("--length", type=int, default=_SCORED.length, show_default=True, help="Tokens in a window."),
    click.option(
        "--max-tokens", type=int, default=_SCORED.max_tokens, show_default=True, help="Tokens scored at most."
    ),
    click.option(
        "--prompt",
        multiple=True,
        help="Text that every model continues greedily; repeatable.",
        metavar="TEXT",
    ),
    click.option(
        "--sample-tokens",
        type=int,
        default=_SCORED.num_sample_tokens,
        show_default=True,
        help="Tokens added to it.",
    ),
)
HARNESS = (
    click.option(
        "--lm-eval",
        metavar="TASK,TASK,...",
        default="",
        callback=lambda _ctx, _option, value: tuple(filter(None, value.split(","))),
        help="Tasks of lm-evaluation-harness (optional: pip install 'megatron_fdd[lm-eval]').",
    ),
    click.option(
        "--lm-eval-tasks",
        type=FOLDER,
        metavar="DIR",
        help="Folder with the YAML files of these tasks; default: those that come with the harness.",
    ),
)


@click.command(
    "evaluate",
    cls=Command,
    may_be_empty=("prompt",),
    free_texts=("prompt", "chat_template_kwargs"),
    epilog=EXAMPLES,
)
@with_options(*MODELS, *INSTRUCTIONS, *TEXT, *HARNESS)
def command(threads: int | None, batch_size: int, **given: Any) -> None:
    """Measure what Hugging Face models learned: ROUGE-L of their answers, perplexity, distance to the teacher, samples.

    Each model answers each --data file with five seeds, as MiniLLM, DistiLLM and FDD are evaluated: Alpaca's prompt
    cut after 256 tokens, at most 256 new ones, temperature 1, ROUGE-L with stemming against the best reference.
    Results go to OUT/NAME/evaluation.json, answers to OUT/NAME/answers/; a killed run continues when the same command
    is given again. With --validation-text the models are also scored on plain text, and with --teacher against the
    teacher too. evaluation.json holds what the last command asked for: to add a file or a text, give the earlier ones
    again too (their answers are kept, not generated again).
    """
    import torch
    from transformers.utils import logging

    from megatron_fdd.evaluate.evaluation import evaluate
    from megatron_fdd.evaluate.table import table

    logging.disable_progress_bar()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        print(table(evaluate(request_from(batch_size=batch_size, **given))))
    except Refusal as error:  # without its remedy, which is for fdd prepare
        _end(f"error: {error.where}: {error.detail}", 1)
    except (ValueError, OSError) as error:
        _end(f"error: {explain(error)}", 1)
    except torch.OutOfMemoryError:
        _end(
            f"error: out of memory with --batch-size {batch_size}: give the same command with a smaller one; it "
            "continues where it was",
            1,
        )
    except KeyboardInterrupt as interrupt:
        _end("interrupted; the same command continues where it was", status_after(interrupt))


def request_from(**given: Any) -> Request:
    """Return the request that a command line means: values of all options but --threads, by name.

    Raises:
        ValueError: a file cannot be read as instructions, or a device does not exist.
    """
    from megatron_fdd.evaluate.data_file import Selection, read_data_files
    from megatron_fdd.evaluate.harness import HarnessTasks
    from megatron_fdd.evaluate.models import NamedModel, Placement
    from megatron_fdd.evaluate.request import Request

    models = [NamedModel(*each) for each in given["hf_model"]]
    if given["teacher"] is not None:
        models.append(NamedModel(TEACHER, given["teacher"]))
    selection = Selection(given["layout"], given["min_answer_words"], given["limit"], given["vicuna_answers"])
    asked = {field.name: given[field.name] for field in dataclasses.fields(GenerationSettings)}
    asked["chat_template"] = None if given["chat_template"] is None else given["chat_template"].text
    return Request(
        models=tuple(models),
        has_teacher=given["teacher"] is not None,
        data=read_data_files(given["data"], selection),
        text=Text(
            validation=given["validation_text"],
            training=given["training_text"],
            length=given["length"],
            max_tokens=given["max_tokens"],
            prompts=given["prompt"],
            num_sample_tokens=given["sample_tokens"],
        ),
        generation=GenerationSettings(**asked),
        placement=Placement.choose(given["device"], given["dtype"]),
        batch_size=given["batch_size"],
        out=given["out"],
        tasks=HarnessTasks(given["lm_eval"], given["lm_eval_tasks"]),
    )


def _end(line: str, status: int) -> None:
    print(f"evaluate: {line}", file=sys.stderr)
    sys.exit(status)
