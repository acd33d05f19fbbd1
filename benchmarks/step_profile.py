"""The parts of a step's time: teacher, student, losses, optimizer, as torch's profiler sees them.

This is host time on a CPU, and time of kernels on a GPU (gaps between them belong to no part). The profiler makes
steps slower. `python -m benchmarks.step --profile FILE.png` is the command.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

STEP = "whole step"
# For each part: its marks in the forward pass, and its autograd nodes.
PARTS = {
    "teacher": ("BesideTeacher.features",),
    "inner layers' losses": ("Objective.inner", "_LinearKL", "_DeltaCosine", "_HeadGrams"),
    "final losses": ("Objective.final", "_HeadLoss"),
    "optimizer": ("Optimizer.step",),
}
STUDENT = "student, and all else"


def profiled(step: Callable[[], Any], device: str) -> dict[str, float]:
    """Run a step under the profiler; return the seconds of each part."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=activities, acc_events=True) as profiler:
        with record_function(STEP):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
    return parts_of(profiler.events(), device)


def parts_of(events: Any, device: str) -> dict[str, float]:
    """Return the seconds of each part; the rest of the step is the student's.

    An event inside a counted one does not count.
    """

    def part(name: str) -> str | None:
        name = name.removeprefix("autograd::engine::evaluate_function: ")
        return next((key for key, marks in PARTS.items() if name.startswith(marks)), None)

    def seconds(event: Any) -> float:
        return (event.device_time_total if device == "cuda" else event.cpu_time_total) / 1e6

    found, whole = dict.fromkeys(PARTS, 0.0), 0.0
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue
        whole += seconds(event) if event.name == STEP else 0.0
        own, parent = part(event.name), event.cpu_parent
        while own is not None and parent is not None:
            own, parent = (None if part(parent.name) else own), parent.cpu_parent
        if own is not None:
            found[own] += seconds(event)
    return {STUDENT: whole - sum(found.values()), **found}


@contextlib.contextmanager
def marked() -> Iterator[None]:
    """Give the forward passes of teacher and losses their names in the profile."""
    from megatron_fdd.losses.objective import Objective
    from megatron_fdd.step.teacher.beside import BesideTeacher

    with contextlib.ExitStack() as stack:
        for owner, name in ((BesideTeacher, "features"), (Objective, "inner"), (Objective, "final")):
            plain = getattr(owner, name)
            stack.enter_context(patch.object(owner, name, record(plain, f"{owner.__name__}.{name}")))
        yield


def record(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Wrap a function so that the profile shows it under this name."""

    @functools.wraps(function)
    def recorded(*arguments: Any, **keywords: Any) -> Any:
        with record_function(name):
            return function(*arguments, **keywords)

    return recorded


def draw(profiles: Mapping[str, Mapping[str, float]], title: str, out: Path) -> None:
    """Draw a bar for each objective, divided into its parts."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(profiles)
    figure, axes = plt.subplots(figsize=(9, 2.8), layout="constrained")
    colors = dict(
        zip((STUDENT, *PARTS), ("#4878a8", "#c9a227", "#b5495b", "#d98c5f", "#8a8a8a"), strict=True)
    )
    lefts = dict.fromkeys(names, 0.0)
    for part, color in colors.items():
        widths = [profiles[name][part] for name in names]
        bars = axes.barh(names, widths, left=[lefts[name] for name in names], color=color, label=part)
        longest = max(sum(each.values()) for each in profiles.values())
        labels = [f"{width:.2f}" if width > 0.04 * longest else "" for width in widths]
        axes.bar_label(bars, labels, label_type="center", fontsize=8, color="white")
        lefts = {name: lefts[name] + width for name, width in zip(names, widths, strict=True)}
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.set_title(title, fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(colors), fontsize=8, frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
