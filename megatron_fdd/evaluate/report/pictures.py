"""Style and file formats of the report's pictures, light and dark."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from PIL import Image

from megatron_fdd.evaluate.report.runs import Run

WIDTH_INCHES = 10.0
_DPI = 130
_LONGEST_NAME = 44
# Colours that differ on white and on black, and for most people who confuse red and green.
_COLORS = ("#3b82c4", "#e07b2a", "#2a9d6f", "#c2498f", "#8a63d2", "#b58900", "#0ea5b7", "#8c6d5a")
_LINE_STYLES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")


@dataclass(frozen=True, slots=True)
class Theme:
    """The colours of the light or the dark style."""

    background: str
    text: str
    faint: str
    no_value: str


LIGHT = Theme(background="#ffffff", text="#1f2328", faint="#d8dee4", no_value="#e7e9ec")
DARK = Theme(background="#15191f", text="#dfe3e8", faint="#363d47", no_value="#2a3038")


@dataclass(frozen=True, slots=True)
class Picture:
    """One figure with the words around it.

    Attributes:
        name: name of the PNG file, without its suffix.
        alternative: what the figure shows, for people who cannot see it.
        light, dark: contents of the PNG files.
    """

    name: str
    title: str
    caption: str
    alternative: str
    light: bytes
    dark: bytes


def draw(make: Callable[[Theme], Figure]) -> tuple[bytes, bytes]:
    """Return the PNG of both themes."""
    return _render(make, LIGHT), _render(make, DARK)


def _render(make: Callable[[Theme], Figure], theme: Theme) -> bytes:
    with matplotlib.rc_context(_style(theme)):
        raw = io.BytesIO()
        make(theme).savefig(raw, format="png", dpi=_DPI)
    # A palette makes the page three times smaller. This way of choosing it keeps the colours of thin lines; the
    # usual way drops them in favour of the many shades around them.
    small = io.BytesIO()
    image = Image.open(raw).convert("RGB")
    image.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(small, "PNG")
    return small.getvalue()


def _style(theme: Theme) -> dict[Any, Any]:
    return {
        "figure.facecolor": theme.background,
        "axes.facecolor": theme.background,
        "axes.edgecolor": theme.faint,
        "axes.labelcolor": theme.text,
        "axes.titlecolor": theme.text,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": theme.faint,
        "grid.linewidth": 0.6,
        "text.color": theme.text,
        # A name may hold dollar signs.
        "text.parse_math": False,
        "xtick.color": theme.text,
        "ytick.color": theme.text,
        "font.size": 9.5,
        "legend.frameon": False,
    }


def color_of(run: Run) -> str:
    """Return the run's colour, the same in every picture and table."""
    return _COLORS[run.number % len(_COLORS)]


def line_style_of(run: Run) -> Literal["-", "--", ":", "-."]:
    """Return the run's line style, which tells runs apart that share a colour."""
    return _LINE_STYLES[run.number // len(_COLORS) % len(_LINE_STYLES)]


def short(name: str, limit: int = _LONGEST_NAME) -> str:
    """Shorten a run's name in its middle if it does not fit: names often differ at their ends."""
    half = (limit - 1) // 2
    return name if len(name) <= limit else f"{name[:half].rstrip()} … {name[-half:].lstrip()}"


def legend_size(runs: Sequence[Run]) -> tuple[int, float]:
    """Return the columns of `add_legend` and its height in inches, for `runs` and one more entry."""
    columns = max(1, int(110 / (max(len(short(run.name)) for run in runs) + 6)))
    return columns, 0.2 * math.ceil((len(runs) + 1) / columns) + 0.1


def add_legend(figure: Figure, runs: Sequence[Run], with_validation: bool, theme: Theme) -> None:
    """Add one legend for all panels, above them."""
    lines = [Line2D([], [], color=color_of(run), linestyle=line_style_of(run), linewidth=2) for run in runs]
    # A label that begins with an underscore would be left out.
    labels = [" " + short(run.name) for run in runs]
    if with_validation:
        lines.append(Line2D([], [], color=theme.text, marker="o", linestyle="", markerfacecolor="none"))
        labels.append(" validation")
    columns = min(len(lines), legend_size(runs)[0])
    figure.legend(lines, labels, loc="outside upper left", ncols=columns)


def plain_ticks(axis: Axis) -> None:
    """Write the numbers of an axis without exponents, on a logarithmic scale too."""
    if axis.get_scale() == "log":
        axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axis.set_minor_formatter(NullFormatter())


def label_iterations(axes: Axes) -> None:
    """Label the horizontal axis with iterations."""
    axes.set_xlabel("iteration")
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    plain_ticks(axes.xaxis)
