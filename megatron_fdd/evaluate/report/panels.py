"""Lines over training, all runs in one panel: losses, gradient norm, pace; and the share of each term."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from megatron_fdd.evaluate.report.metrics import (
    TOKENS_PER_SECOND,
    TOTAL,
    Metrics,
    bin_width,
    cut_into_bins,
    in_digits,
)
from megatron_fdd.evaluate.report.pictures import (
    WIDTH_INCHES,
    Picture,
    Theme,
    add_legend,
    color_of,
    draw,
    label_iterations,
    legend_size,
    line_style_of,
    plain_ticks,
    short,
)
from megatron_fdd.evaluate.report.runs import Run
from megatron_fdd.evaluate.report.terms import kinds_of
from megatron_fdd.losses.terms import SHARE, VALIDATION

# More points than this only make a line thick.
_MOST_POINTS = 150
# With more validation points, they are drawn smaller, so that they do not hide the line under them.
_MANY_EVALUATIONS = 30
# Values with a larger ratio need a logarithmic scale to be seen.
_WIDE = 50
# In stacking order.


@dataclass(frozen=True, slots=True)
class Panel:
    """One number of the metrics file, and how it is labelled.

    Attributes:
        cuts_peaks: true if a few much higher values, such as the first step's time, may be cut off.
    """

    key: str
    title: str
    unit: str
    cuts_peaks: bool = False


PROGRESS = (
    Panel("grad_norm", "gradient norm, before clipping", "norm"),
    Panel("seconds", "time of a step", "seconds per iteration", cuts_peaks=True),
    Panel(TOKENS_PER_SECOND, "speed", "tokens with a label per second"),
)


def draw_losses(runs: Sequence[Run]) -> Picture | None:
    """Draw every loss term; None if no run has any."""
    panels = [Panel(TOTAL, f"{TOTAL}: the weighted sum that is trained on", "nats per token")]
    panels += [
        Panel(kind.name, f"{kind.name}: {kind.title}".removesuffix(": "), kind.unit)
        for kind in kinds_of(runs)
    ]
    return _draw_lines(runs, panels, "losses", "Loss terms over training")


def draw_teachers(runs: Sequence[Run]) -> Picture | None:
    """Draw the terms over each teacher's own tokens; None if no run has several teachers."""
    keys = {key for run in runs if run.metrics for key in run.metrics.curves}
    names = sorted(key.removeprefix(f"{TOTAL} ") for key in keys if key.startswith(f"{TOTAL} "))
    units = {TOTAL: "nats per token"} | {kind.name: kind.unit for kind in kinds_of(runs)}
    panels = [
        Panel(f"{term} {name}", f"{term} of the teacher {name}", unit)
        for term, unit in units.items()
        for name in names
    ]
    return _draw_lines(runs, panels, "teachers", "Loss terms of each teacher's own tokens")


def draw_progress(runs: Sequence[Run]) -> Picture | None:
    """Draw gradient norm and pace; None if no run has any."""
    return _draw_lines(runs, PROGRESS, "progress", "Gradient and pace")


def draw_shares(runs: Sequence[Run]) -> Picture | None:
    """Draw the share of each term in the total, one panel for each run; None if no run has shares."""
    shown = [run for run in runs if run.metrics and _shared_terms(run.metrics)]
    if not shown:
        return None
    width = bin_width(longest(shown), _MOST_POINTS)
    light, dark = draw(lambda theme: _share_figure(shown, theme))
    return Picture(
        name="shares",
        title="Share of each term in the total",
        caption="Which term drives the step: its weight times its value, as a part of the total. "
        + _means(width, "up to "),
        alternative="Stacked areas over the iterations, one panel for each run. At the end: "
        + "; ".join(f"{run.name}: {_last_shares(run.metrics)}" for run in shown if run.metrics),
        light=light,
        dark=dark,
    )


def longest(runs: Sequence[Run]) -> int:
    """Return the number of iterations of the longest run that has metrics."""
    return max((run.metrics.num_iterations for run in runs if run.metrics), default=1)


def _draw_lines(runs: Sequence[Run], panels: Sequence[Panel], name: str, title: str) -> Picture | None:
    shown = [panel for panel in panels if any(_has(run, panel.key) for run in runs)]
    if not shown:
        return None
    width = bin_width(longest(runs), _MOST_POINTS)
    light, dark = draw(lambda theme: _line_figure(runs, shown, width, theme))
    caption = _means(width)
    if width > 1:
        caption += " The shade around a line reaches from the lowest to the highest value."
    return Picture(
        name, title, caption.strip(), "Lines over the iterations. " + _last_values(runs, shown), light, dark
    )


def _line_figure(runs: Sequence[Run], panels: Sequence[Panel], width: int, theme: Theme) -> Figure:
    rows = math.ceil(len(panels) / 2)
    drawn = [run for run in runs if any(_has(run, panel.key) for panel in panels)]
    figure = Figure(figsize=(WIDTH_INCHES, legend_size(drawn)[1] + 2.7 * rows), layout="constrained")
    grid = figure.add_gridspec(rows, 2)
    # If the number of panels is odd, the first one takes a whole row.
    odd = len(panels) % 2
    for position, panel in enumerate(panels):
        place = position + (odd and position > 0)
        cell = grid[0, :] if odd and position == 0 else grid[place // 2, place % 2]
        _draw_panel(figure.add_subplot(cell), runs, panel, width, theme)
    held_out = any(_has(run, VALIDATION + panel.key, training=False) for run in runs for panel in panels)
    add_legend(figure, drawn, held_out, theme)
    return figure


def _draw_panel(axes: Axes, runs: Sequence[Run], panel: Panel, width: int, theme: Theme) -> None:
    drawn = []
    for run in runs:
        curves = run.metrics.curves if run.metrics else {}
        color = color_of(run)
        if panel.key in curves:
            bins = cut_into_bins(curves[panel.key], width)
            # A run of one iteration is drawn as a point.
            marker = "." if len(bins.mean) == 1 else ""
            axes.plot(
                bins.centre,
                bins.mean,
                color=color,
                linestyle=line_style_of(run),
                linewidth=1.6,
                marker=marker,
            )
            if width > 1:
                axes.fill_between(
                    bins.centre, bins.lowest, bins.highest, color=color, alpha=0.13, linewidth=0
                )
            drawn += [bins.lowest, bins.highest]
        if VALIDATION + panel.key in curves:
            bins = cut_into_bins(curves[VALIDATION + panel.key], width)
            axes.plot(
                bins.centre,
                bins.mean,
                "o",
                color=color,
                markersize=5 if len(bins.mean) <= _MANY_EVALUATIONS else 3,
                markeredgecolor=theme.background,
                zorder=3,
            )
            drawn.append(bins.mean)
    axes.set_title(panel.title)
    axes.set_ylabel(panel.unit + _scale(axes, panel, drawn))
    plain_ticks(axes.yaxis)
    label_iterations(axes)


def _scale(axes: Axes, panel: Panel, drawn: Sequence[NDArray[np.float64]]) -> str:
    """Choose the vertical scale for the drawn values; return the words for the axis label."""
    values = np.concatenate(drawn)
    usual = float(np.quantile(values, 0.95))
    if panel.cuts_peaks and values.max() > 3 * usual:
        axes.set_ylim(0, 1.4 * usual)
        return " (peaks cut off)"
    if 0 < values.min() * _WIDE < values.max():
        axes.set_yscale("log")
        return " (log scale)"
    return ""


def _share_figure(runs: Sequence[Run], theme: Theme) -> Figure:
    columns = min(2, len(runs))
    rows = math.ceil(len(runs) / columns)
    colors = {kind.name: kind.color for kind in kinds_of(runs)}
    figure = Figure(figsize=(WIDTH_INCHES, 0.5 + 2.3 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes, run in zip(grid.flat, runs, strict=False):
        assert run.metrics is not None
        centre, parts = _stack(run.metrics, bin_width(longest([run]), _MOST_POINTS))
        axes.stackplot(centre, *parts.values(), colors=[colors[term] for term in parts], linewidth=0)
        axes.set_title(short(run.name))
        axes.set_ylim(0, 1)
        axes.margins(x=0)
        axes.set_axisbelow(False)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        label_iterations(axes)
    for axes in grid.flat[len(runs) :]:
        axes.set_visible(False)
    in_use = [
        term for term in colors if any(run.metrics and term in _shared_terms(run.metrics) for run in runs)
    ]
    patches = [Patch(color=colors[term]) for term in in_use]
    figure.legend(patches, in_use, loc="outside upper left", ncols=len(in_use))
    return figure


def _stack(metrics: Metrics, width: int) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
    """Return bin centres, and each term's share in them; 0 where a term has no value."""
    by_term = {term: cut_into_bins(metrics.curves[SHARE + term], width) for term in _shared_terms(metrics)}
    indices = np.unique(np.concatenate([bins.index for bins in by_term.values()]))
    centre = np.zeros(len(indices))
    parts = {}
    for term, bins in by_term.items():
        rows = np.searchsorted(indices, bins.index)
        centre[rows] = bins.centre
        parts[term] = np.zeros(len(indices))
        parts[term][rows] = bins.mean
    return centre, parts


def _shared_terms(metrics: Metrics) -> list[str]:
    """Return the terms that have a share in the total at some time."""
    return [
        key.removeprefix(SHARE)
        for key, curve in metrics.curves.items()
        if key.startswith(SHARE) and curve.values.any()
    ]


def _has(run: Run, key: str, *, training: bool = True) -> bool:
    """Whether a run has values of `key`; with `training`, validation values alone count too."""
    curves = run.metrics.curves if run.metrics else {}
    return key in curves or (training and VALIDATION + key in curves)


def _means(width: int, how_many: str = "") -> str:
    return f"Smoothed: each point is the mean of {how_many}{width:,} iterations." if width > 1 else ""


def _last_values(runs: Sequence[Run], panels: Sequence[Panel]) -> str:
    """Return in words the last value of each run's line."""
    sentences = []
    for panel in panels:
        ends = [
            f"{run.name} {in_digits(run.metrics.curves[panel.key].values[-1])}"
            for run in runs
            if run.metrics and panel.key in run.metrics.curves
        ]
        sentences.append(f"Last {panel.key}: {', '.join(ends)}.")
    return " ".join(sentences)


def _last_shares(metrics: Metrics) -> str:
    return ", ".join(
        f"{term} {metrics.curves[SHARE + term].values[-1]:.0%}" for term in _shared_terms(metrics)
    )
