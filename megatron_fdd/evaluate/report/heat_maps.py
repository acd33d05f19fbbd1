"""A term of every layer pair over training: one map for each run, with the same colour scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from megatron_fdd.evaluate.report.metrics import Metrics, bin_width, cut_into_bins
from megatron_fdd.evaluate.report.panels import longest
from megatron_fdd.evaluate.report.pictures import (
    WIDTH_INCHES,
    Picture,
    Theme,
    draw,
    label_iterations,
    plain_ticks,
    short,
)
from megatron_fdd.evaluate.report.runs import Run
from megatron_fdd.evaluate.report.terms import Kind

_MOST_COLUMNS = 120
# With fewer columns a map would not show a course over training.
_LEAST_COLUMNS = 8
# If a larger part of the cells has no value, columns are made wider.
_MOST_EMPTY = 0.02
_MOST_ROW_LABELS = 16
# Values with a larger ratio need a logarithmic scale, or all late steps would look alike.
_WIDE = 8


@dataclass(frozen=True, slots=True)
class HeatMap:
    """The values of one run.

    Attributes:
        width: number of iterations in a column.
        values: float64 [layer pairs, bins], NaN where no step of the bin has a value.
        edges: float64 [bins + 1], in iterations.
    """

    run: Run
    width: int
    pairs: list[str]
    values: NDArray[np.float64]
    edges: NDArray[np.float64]


def draw_heat_map(runs: Sequence[Run], kind: Kind) -> Picture | None:
    """Draw a term of inner layers; None if no run has a layer of it."""
    shown = [run for run in runs if run.metrics and run.metrics.layer_pairs(kind.name)]
    if not shown:
        return None
    maps = [_filled_heat_map(run, kind.name) for run in shown]
    light, dark = draw(lambda theme: _figure(maps, kind.unit, theme))
    return Picture(
        name=kind.name,
        title=f"{kind.name.capitalize()} by layer",
        caption=_caption(maps, kind.caption),
        alternative=f"Heat maps, layer pairs as rows, iterations as columns. {_ends(maps)}",
        light=light,
        dark=dark,
    )


def make_heat_map(run: Run, term: str, width: int) -> HeatMap:
    """Return means over `width` iterations, from the run's first bin to its last."""
    metrics = run.metrics
    assert isinstance(metrics, Metrics)
    first, last = (metrics.first - 1) // width, (metrics.last - 1) // width
    pairs = metrics.layer_pairs(term)
    values = np.full((len(pairs), last - first + 1), np.nan)
    for row, pair in enumerate(pairs):
        bins = cut_into_bins(metrics.curves[f"{term} {pair}"], width)
        values[row, bins.index - first] = bins.mean
    edges: NDArray[np.float64] = np.arange(first, last + 2, dtype=np.float64) * width + 0.5
    # The last bin may be only half full.
    edges[0], edges[-1] = max(edges[0], metrics.first - 0.5), metrics.last + 0.5
    return HeatMap(run, width, pairs, values, edges)


def _filled_heat_map(run: Run, term: str) -> HeatMap:
    """Return a map with columns as narrow as can be seen.

    Columns are wider if too many cells would otherwise be empty.
    """
    heat_map = make_heat_map(run, term, bin_width(longest([run]), _MOST_COLUMNS))
    while heat_map.values.shape[1] >= 2 * _LEAST_COLUMNS and np.isnan(heat_map.values).mean() > _MOST_EMPTY:
        heat_map = make_heat_map(run, term, 2 * heat_map.width)
    return heat_map


def _caption(maps: Sequence[HeatMap], what: str) -> str:
    caption = f"{what} All maps have the same colour scale; dark blue is closest."
    widths = {heat_map.width for heat_map in maps}
    if widths != {1}:
        caption += " Smoothed: each cell is the mean of "
        caption += (
            f"{widths.pop():,} iterations." if len(widths) == 1 else "as many iterations as its map says."
        )
    if any(np.isnan(heat_map.values).any() for heat_map in maps):
        caption += " Grey: no step measured the layer."
    return caption


def _ends(maps: Sequence[HeatMap]) -> str:
    """Return in words where each layer of each run ends."""
    ends = []
    for heat_map in maps:
        assert heat_map.run.metrics is not None
        last = [
            f"{pair} {row[np.isfinite(row)][-1]:.3g}"
            for pair, row in zip(heat_map.pairs, heat_map.values, strict=True)
        ]
        ends.append(f"{heat_map.run.name}: {', '.join(last)}")
    return f"At the end: {'; '.join(ends)}."


def _figure(maps: Sequence[HeatMap], unit: str, theme: Theme) -> Figure:
    columns = min(2, len(maps))
    rows = math.ceil(len(maps) / columns)
    tallest = max(len(heat_map.pairs) for heat_map in maps)
    height = 1.0 + min(3.2, max(0.9, 0.26 * tallest))
    figure = Figure(figsize=(WIDTH_INCHES, height * rows + 0.2), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    norm = _norm(maps)
    for axes, heat_map in zip(grid.flat, maps, strict=False):
        _draw_map(axes, heat_map, norm, theme)
        label_iterations(axes)
        if heat_map.width > 1:
            axes.set_xlabel(f"iteration (cells are means of {heat_map.width:,})")
    for axes in grid.flat[len(maps) :]:
        axes.set_visible(False)
    scale = "\n(log scale)" if isinstance(norm, LogNorm) else ""
    bar = figure.colorbar(grid.flat[0].collections[0], ax=grid, pad=0.015, aspect=14 * rows, fraction=0.05)
    bar.set_label(unit + scale)
    bar.outline.set_visible(False)
    plain_ticks(bar.ax.yaxis)
    return figure


def _draw_map(axes: Axes, heat_map: HeatMap, norm: Normalize, theme: Theme) -> None:
    colors = colormaps["viridis"].with_extremes(bad=theme.no_value)
    num_pairs = len(heat_map.pairs)
    axes.grid(visible=False)
    axes.pcolormesh(
        heat_map.edges,
        np.arange(num_pairs + 1) - 0.5,
        np.ma.masked_invalid(heat_map.values),
        cmap=colors,
        norm=norm,
        rasterized=True,
    )
    axes.invert_yaxis()
    step = math.ceil(num_pairs / _MOST_ROW_LABELS)
    labels = [pair.replace("s", "").replace(":t", " : ") for pair in heat_map.pairs]
    axes.set_yticks(range(0, num_pairs, step), labels[::step])
    axes.tick_params(length=0, axis="y")
    axes.set_ylabel("student : teacher\nblock")
    axes.set_title(short(heat_map.run.name, 30))


def _norm(maps: Sequence[HeatMap]) -> Normalize:
    """Return one colour scale for all runs."""
    found = np.concatenate([heat_map.values.ravel() for heat_map in maps])
    lowest, highest = float(np.nanmin(found)), float(np.nanmax(found))
    return (LogNorm if 0 < lowest * _WIDE < highest else Normalize)(lowest, highest)
