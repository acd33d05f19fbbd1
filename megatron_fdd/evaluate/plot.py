"""Loss curves from a metrics file (`--fdd-metrics-file`) as a PNG."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of a backend that needs no screen)
from matplotlib.axes import Axes  # noqa: E402

VALIDATION = "valid"
# Panels in this order; any other number of the file that is not a loss or in `_NOT_DRAWN` is left out.
_PANELS = {
    "total": "total: weighted sum of the terms",
    "ce": "ce: cross-entropy with the data",
    "kd": "kd: divergence from the teacher's prediction",
    "trajectory": "trajectory: divergence per layer",
    "delta": "delta: first derivative per layer",
    "share": "share of each term in the total",
    "grad_norm": "gradient norm",
}
_UNITS = {"total": "nats", "ce": "nats", "kd": "nats", "trajectory": "nats", "delta": "1 - cosine"}


@dataclass
class Curve:
    """One line: iterations and values, in the order of the file."""

    iterations: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


@dataclass
class Panel:
    """The lines of one group of terms, training and validation, by label ("" is the group's own value)."""

    training: dict[str, Curve] = field(default_factory=lambda: defaultdict(Curve))
    validation: dict[str, Curve] = field(default_factory=lambda: defaultdict(Curve))


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics file; a last line that a killed run left unfinished is dropped.

    Raises:
        ValueError: a malformed line before the last, or no record at all; names file and line.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: malformed JSON ({error.msg})") from error
    if not records:
        raise ValueError(f"{path} holds no finished record: train for at least one iteration")
    return records


def sort_into_panels(records: list[dict[str, Any]]) -> dict[str, Panel]:
    """Panels with at least one value, in the order of drawing.

    A key is [valid] group [label], parted by a space or a slash: "kd", "trajectory s4:t9", "valid/kd".
    Values that are not finite numbers (null in the file) leave a gap.
    """
    panels = {group: Panel() for group in _PANELS}
    for record in records:
        for key, value in record.items():
            parts = re.split("[ /]", key)
            held_out = parts[0] == VALIDATION
            group, label = [*parts[held_out:], "", ""][0], " ".join(parts[held_out + 1 :])
            if group not in panels or not isinstance(value, int | float | None):
                continue
            curves = panels[group].validation if held_out else panels[group].training
            curves[label].iterations.append(record["iteration"])
            curves[label].values.append(math.nan if value is None else value)
    return {group: panel for group, panel in panels.items() if panel.training or panel.validation}


def draw_panel(axes: Axes, group: str, panel: Panel) -> None:
    """Layers as thin coloured lines, the group's own value as a thick black one, validation as points."""
    layers = sorted((label for label in panel.training if label), key=_first_number)
    colors = plt.get_cmap("viridis" if group in ("trajectory", "delta") else "tab10")
    for index, label in enumerate(layers):
        curve = panel.training[label]
        color = colors(index / max(1, len(layers))) if group in ("trajectory", "delta") else colors(index)
        axes.plot(curve.iterations, curve.values, color=color, linewidth=1.2, label=label)
    if "" in panel.training:
        curve = panel.training[""]
        axes.plot(
            curve.iterations, curve.values, color="black", linewidth=1.8, label="mean" if layers else group
        )
    for label, curve in panel.validation.items():
        name = f"validation {label}".strip()
        axes.plot(curve.iterations, curve.values, "o", color="tab:red", markersize=4, label=name)
    axes.set_title(_PANELS[group], fontsize=10, loc="left")
    axes.set_xlabel("iteration")
    axes.set_ylabel(_UNITS.get(group, ""))
    axes.grid(alpha=0.3)
    if len(axes.lines) > 1:
        axes.legend(fontsize=8)


def _first_number(label: str) -> tuple[int, str]:
    found = re.search(r"\d+", label)
    return (int(found.group()) if found else -1, label)


def plot_metrics(metrics_file: Path, out: Path) -> int:
    """Draw every loss term of a metrics file over the iterations; the number of panels drawn.

    Raises:
        ValueError: no record, a malformed line, or no loss term in the file.
    """
    panels = sort_into_panels(read_records(metrics_file))
    if not panels:
        raise ValueError(f"{metrics_file} holds none of {', '.join(_PANELS)}: is it a metrics file?")
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(6 * columns, 3.2 * rows), squeeze=False, layout="constrained"
    )
    for axes, (group, panel) in zip(grid.flat, panels.items(), strict=False):
        draw_panel(axes, group, panel)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120, format="png")
    plt.close(figure)
    return len(panels)
