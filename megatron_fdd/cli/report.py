"""`fdd report`: losses, layers, pace, scores and flags of one or more runs on one page."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from megatron_fdd.cli.command import Command, plugin, trust_checkpoint
from megatron_fdd.host.disk import explain

EXAMPLES = """\b
examples:
  fdd report runs/distilled --out runs/report
  fdd report fdd=runs/fdd kd=runs/kd teacher=runs/evaluation/teacher --out runs/report"""


@click.command("report", cls=Command, epilog=EXAMPLES)
@click.argument("runs", nargs=-1, required=True, metavar="[NAME=]RUN...")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Folder for the report."
)
@plugin
@trust_checkpoint
def command(runs: tuple[str, ...], out: Path) -> None:
    """Show one or more runs side by side on one page: losses, layers, pace, scores, flags.

    A RUN is a folder that holds metrics.jsonl (what --fdd-metrics-file wrote) or evaluation.json (what `fdd evaluate`
    wrote, also found in RUN/evaluation/), or a metrics file of another name. Flags are read from the checkpoints of a
    folder that was given to --save. NAME=RUN gives a run a name; the same name twice joins both into one run, for
    example metrics at one place and an evaluation at another.

    Writes report.html (a single file), report.md and its PNG files. A run that is still going can be shown. Where a
    run's checkpoint is refused, the report is written without its flags, and the exit status is 1.
    """
    try:
        from megatron_fdd.evaluate.report import write_report

        report = write_report(runs, out)
    except ModuleNotFoundError as error:
        if str(error.name).startswith("megatron_fdd"):
            raise
        needed = f"a report needs {error.name}: pip install 'megatron_fdd[evaluate]'"
        print(f"report: error: {needed}", file=sys.stderr)
        sys.exit(1)
    except (ValueError, OSError) as error:
        print(f"report: error: {explain(error)}", file=sys.stderr)
        sys.exit(1)
    print(f"{out / 'report.html'}: {counted(report.runs, 'run')}, {counted(report.pictures, 'picture')}")
    unread = [f"{run.name}: {remark}" for run in report.runs for remark in run.remarks]
    for each in unread:
        print(
            f"report: error: {each}; the report was written without that checkpoint's flags", file=sys.stderr
        )
    if unread:
        sys.exit(1)


def counted(things: Sequence[object], name: str) -> str:
    """Return a count with its noun, such as "1 run" or "2 runs"."""
    return f"{len(things)} {name}{'s' * (len(things) != 1)}"
