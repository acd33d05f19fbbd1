"""The command `fdd`: one subcommand for each step, from a Hugging Face teacher to a report on the student.

A subcommand is a `click` command in the module that `COMMANDS` names. It imports torch only when it runs, so that
`--help` is quick.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import NoReturn

import click

from megatron_fdd.cli.command import Interruptible
from megatron_fdd.host.process import end_with, end_with_launcher

# In the order of use; each with its module and its line in `fdd --help`.
COMMANDS = {
    "doctor": ("doctor", "Is this machine fit for a training? Versions, Megatron's seams, limits."),
    "student": (
        "init_student",
        "Make a student: some of a teacher's layers, or a small model with its vocabulary.",
    ),
    "import": ("hf_to_mcore", "Hugging Face model to Megatron checkpoint."),
    "prepare": ("prepare_data", "Text or instructions to token files."),
    "plan": ("plan", "Which rank does what, and the memory it needs; trains nothing."),
    "teach": ("teach", "Compute a teacher's features once, for trainings that read them from disk."),
    "store": ("store", "What is in a store of features, is it whole, and what can go."),
    "train": ("train", "Distil: Megatron's training loop with a teacher beside the student."),
    "export": ("mcore_to_hf", "Megatron checkpoint to Hugging Face model."),
    "evaluate": ("evaluate", "ROUGE-L of answers, perplexity, distance to the teacher."),
    "report": ("report", "Losses, layers, pace and scores of runs on one page."),
}
EXAMPLE = """\b
example, from a teacher to its student:
  fdd student --hf-model teacher-hf --num-layers 16 --hf-out student-hf
  fdd import --hf-model teacher-hf --save teacher
  fdd import --hf-model student-hf --save student
  fdd prepare *.jsonl --output-prefix data/train --tokenizer-type HuggingFaceTokenizer \\
      --tokenizer-model teacher-hf --append-eod
  fdd train --nproc-per-node 8 -- --pretrained-checkpoint student --teacher-load teacher \\
      --load run --save run --train-data-path data/train ...
  fdd export --load run --hf-out distilled-hf
  fdd evaluate --hf-model distilled-hf --teacher teacher-hf --validation-text valid.jsonl

\b
`fdd COMMAND --help` explains a command."""


class _Commands(Interruptible, click.Group):
    """The group of subcommands, each imported when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"megatron_fdd.cli.{COMMANDS[cmd_name][0]}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the subcommands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.command(cls=_Commands, epilog=EXAMPLE, context_settings={"max_content_width": 100})
@click.version_option(package_name="megatron_fdd")
def main() -> None:
    """Distil a large language model into a smaller one on many GPUs, with Megatron-Core.

    The student learns its teacher's predictions, the trajectory of predictions through the teacher's depth, and the
    trajectory's first derivative (Feature Dynamics Distillation).
    """


def run() -> NoReturn:
    """Run the command line as `fdd`, and end this process."""
    end_with_launcher()
    end_with(partial(main, prog_name="fdd"))
