"""The study's figure: scores of every seed, and the distance of the inner layers from the teacher's."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of a backend that needs no screen)
from matplotlib.axes import Axes  # noqa: E402

if TYPE_CHECKING:
    from table import Results

COLORS = plt.get_cmap("tab10")
# The right column shows the inner layers of these methods; more lines would hide each other.
INNER = ("ce", "kd", "kd-trajectory", "kd-delta", "fdd")


def draw_scores(axes: Axes, results: Results, student: str) -> None:
    """Draw a row for each method, with a dot for each seed and a bar at the mean."""
    methods = results.methods(student)
    for row, method in enumerate(methods):
        values = [run["test"]["kl_to_teacher"] for run in results.of(student, method).values()]
        axes.plot(values, [row] * len(values), "o", color=COLORS(row), markersize=4, alpha=0.6)
        axes.plot([statistics.mean(values)], [row], "|", color="black", markersize=12)
    axes.set_yticks(range(len(methods)), methods)
    axes.invert_yaxis()
    axes.set_xlabel("KL(teacher || student), test stories, nats")
    axes.set_title(f"{student}: dots are seeds, bars their mean", fontsize=10, loc="left")
    axes.grid(alpha=0.3)


def draw_inner(axes: Axes, results: Results, student: str) -> None:
    """Draw a line for each method over the pairs of blocks, with the final logits last."""
    methods = results.methods(student)
    for method in (method for method in INNER if method in methods):
        runs = list(results.of(student, method).values())
        names = [name for name in runs[0]["inner"] if name.startswith("trajectory")]
        values = [statistics.mean(run["inner"][name] for run in runs) for name in names]
        values.append(statistics.mean(run["test"]["kl_to_teacher"] for run in runs))
        labels = [*(name.removeprefix("trajectory ") for name in names), "final"]
        axes.plot(range(len(labels)), values, "o-", color=COLORS(methods.index(method)), label=method)
        axes.set_xticks(range(len(labels)), labels)
    axes.set_yscale("log")
    axes.set_ylabel("KL(teacher || student), nats")
    axes.set_xlabel("pair of blocks")
    axes.set_title(f"{student}: predictions of inner layers", fontsize=10, loc="left")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)


def draw(results: Results, out: Path) -> None:
    """Write the PNG, with a row of panels for each student."""
    students = [student for student in ("thin", "shallow") if results.methods(student)]
    figure, grid = plt.subplots(
        len(students), 2, figsize=(11, 3.8 * len(students)), squeeze=False, layout="constrained"
    )
    for (scores, inner), student in zip(grid, students, strict=True):
        draw_scores(scores, results, student)
        draw_inner(inner, results, student)
    figure.savefig(out, dpi=100, format="png")
    plt.close(figure)
