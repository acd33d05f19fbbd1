"""The report: several runs side by side on one page, with losses, layers, pace, scores, and what each run was."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from megatron_fdd.evaluate.report.data import data_facts
from megatron_fdd.evaluate.report.facts import flag_facts, run_facts, sample_facts, setting_facts
from megatron_fdd.evaluate.report.heat_maps import draw_heat_map
from megatron_fdd.evaluate.report.page import Report, to_html, to_markdown
from megatron_fdd.evaluate.report.panels import draw_losses, draw_progress, draw_shares, draw_teachers
from megatron_fdd.evaluate.report.runs import Run, read_runs
from megatron_fdd.evaluate.report.scores import evaluation_rows, term_rows
from megatron_fdd.evaluate.report.terms import kinds_of
from megatron_fdd.host.disk import make_folder, regular_file, replacing, writing

__all__ = ["make_report", "write_report"]


def write_report(arguments: Sequence[str], folder: Path) -> Report:
    """Read the runs (`[NAME=]PATH` each) and write report.html, report.md and its pictures into `folder`.

    Raises:
        ValueError: a run cannot be read (nothing is written then); or `folder` cannot be written.
    """
    report = make_report(read_runs(arguments))
    make_folder("--out", folder, folder)
    with writing("--out", folder):
        for picture in report.pictures:
            _write(folder / f"{picture.name}.png", picture.light)
        _write(folder / "report.md", to_markdown(report).encode())
        _write(folder / "report.html", to_html(report).encode())
    return report


def make_report(runs: Sequence[Run]) -> Report:
    """Make tables and pictures of what the runs have; parts that no run has are left out."""
    pictures = [
        draw_losses(runs),
        draw_teachers(runs),
        *(draw_heat_map(runs, kind) for kind in kinds_of(runs)),
        draw_shares(runs),
        draw_progress(runs),
    ]
    scores = [("Scores", evaluation_rows(runs)), ("Last values of the loss terms", term_rows(runs))]
    facts = [
        ("Runs", run_facts(runs)),
        ("Flags", flag_facts(runs)),
        ("Training data, as it was prepared", data_facts(runs)),
        ("Settings of the evaluation", setting_facts(runs)),
        ("What the models write", sample_facts(runs)),
    ]
    return Report(
        runs=runs,
        scores=[(title, rows) for title, rows in scores if rows],
        pictures=[picture for picture in pictures if picture is not None],
        facts=[(title, rows) for title, rows in facts if rows],
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )


def _write(path: Path, content: bytes) -> None:
    """Write a file at once, so that no half-written file has the final name."""
    with replacing(regular_file("--out", path)) as partial:
        partial.write_bytes(content)
