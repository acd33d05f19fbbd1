"""Time and memory of a function, fit for comparison: one thread, process CPU time, medians, a process for each.

Wall times of several threads on a shared machine differ tenfold for the same code; CPU time of one thread repeats
to about a percent. If it does not, no ratio is given. On a GPU: device time, and the allocator's peak.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import importlib.metadata
import multiprocessing
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks import lines

RESULTS = Path(__file__).parent / "results.jsonl"
# If repeats differ by more, no ratio is given.
MAX_SPREAD = 0.05
# How many sets of repeats are tried in search of a steady one.
ATTEMPTS = 3
WARM_UP_S = 1.5
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Measurement:
    """One implementation at one size.

    Attributes:
        seconds: median time of a call: process CPU time, or device time on a GPU.
        spread: largest minus smallest repeat, divided by the median.
        peak_mib: the most memory during a call, beyond what was in use before it.
    """

    seconds: float
    spread: float
    peak_mib: float

    @property
    def is_steady(self) -> bool:
        """Whether the repeats agree well enough for a ratio."""
        return self.spread <= MAX_SPREAD


def measure(make: Callable[[], Callable[[], object]], repeats: int, device: str = "cpu") -> Measurement:
    """Measure in a separate process (on a GPU in this one).

    `make` prepares the inputs and returns the measured function.

    Raises:
        RuntimeError: the process failed; its own traceback is on stderr. Or the GPU's memory is too small.
    """
    if device == "cuda":  # its allocator knows what a call takes, whatever was there before
        gc.collect()
        torch.cuda.empty_cache()
        return _measured(make, repeats, device)
    context = multiprocessing.get_context("fork")
    results: multiprocessing.SimpleQueue[Measurement] = context.SimpleQueue()
    process = context.Process(target=_run, args=(make, repeats, device, results))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"the measured process ended with {process.exitcode}")
    return results.get()


def _run(
    make: Callable[[], Callable[[], object]],
    repeats: int,
    device: str,
    results: multiprocessing.SimpleQueue[Measurement],
) -> None:
    torch.set_num_threads(1)
    results.put(_measured(make, repeats, device))


def _measured(make: Callable[[], Callable[[], object]], repeats: int, device: str) -> Measurement:
    function = make()
    function()  # creates what is created only once
    if device == "cuda":
        _warm_up(function)
    timed = device_seconds if device == "cuda" else cpu_seconds
    peak_mib = peak_of(function, device)
    for _ in range(ATTEMPTS):
        found = summary([timed(function) for _ in range(repeats)], peak_mib)
        if found.is_steady:
            break
    return found


def _warm_up(function: Callable[[], object]) -> None:
    """Call the function until the GPU's clock has come down to what its power allows for long."""
    started = time.perf_counter()
    while time.perf_counter() - started < WARM_UP_S:
        function()
        torch.cuda.synchronize()


def summary(times: list[float], peak_mib: float) -> Measurement:
    """Return median and spread of the repeats."""
    median = statistics.median(times)
    return Measurement(median, (max(times) - min(times)) / median, peak_mib)


def first_steady(times: list[float], repeats: int, peak_mib: float) -> Measurement:
    """Return the first steady measurement of so many repeats in a row; else the last one."""
    for start in range(0, len(times), repeats):
        found = summary(times[start : start + repeats], peak_mib)
        if found.is_steady:
            break
    return found


def cpu_seconds(function: Callable[[], object]) -> float:
    """Return the process CPU time of a call."""
    started = time.process_time()
    function()
    return time.process_time() - started


def device_seconds(function: Callable[[], object]) -> float:
    """Return how long a call keeps the GPU busy."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def peak_of(function: Callable[[], object], device: str = "cpu") -> float:
    """Return the most MiB that torch's allocator has given out during a call, beyond what was in use before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    # /proc is not used: it includes what the C library keeps for later, which changes from run to run.
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        function()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak / MIB


def record(benchmark: str, size: Mapping[str, Any], rows: Mapping[str, Measurement], **more: Any) -> None:
    """Append machine, versions, date and every row to the results file."""
    entry = {
        **origin(),
        "benchmark": benchmark,
        "size": dict(size),
        "rows": {
            name: {key: round(value, 4) for key, value in asdict(row).items()} for name, row in rows.items()
        },
        **more,
    }
    lines.write(RESULTS, "benchmark", entry)


@cache
def origin() -> dict[str, Any]:
    """Return when, where and from what a result was made. A process has one date, by which tables tell runs apart."""
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"date": date, "machine": machine(), "python": platform.python_version(), "versions": versions()}


def versions() -> dict[str, str]:
    """Return the versions of everything that is measured or compared."""
    names = ("torch", "triton", "megatron-core", "transformer-engine", "liger-kernel", "nvidia-modelopt")
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@cache
def machine() -> str:
    """Return the machine of the figures: the GPU's name and driver, or the processor's, with one thread."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, driver {_driver()}"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.split(':', 1)[1].strip()}, 1 thread"
    return f"{platform.machine()}, 1 thread"


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]


def table(rows: Mapping[str, Measurement], base: str, heading: str = "x floor") -> str:
    """Return one line for each implementation; with ratios to `base` if both are steady."""
    lines = [f"{'':<36}{'seconds':>9}{'spread':>9}{heading:>10}{'peak MiB':>10}"]
    for name, row in rows.items():
        is_steady = row.is_steady and rows[base].is_steady
        ratio = f"{row.seconds / rows[base].seconds:.2f}" if is_steady else "unsteady"
        lines.append(f"{name:<36}{row.seconds:>9.3f}{row.spread:>8.1%}{ratio:>11}{row.peak_mib:>10.0f}")
    return "\n".join(lines)
