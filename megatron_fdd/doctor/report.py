"""The report: all checks in order, with a line for each finding."""

from __future__ import annotations

import contextlib
import importlib
import io
import warnings
from collections.abc import Iterator, Sequence

from megatron_fdd.doctor.finding import Finding, first_line

# Checks are listed by name, because their modules import what may be missing or broken: torch, Megatron.
CHECKS = (
    "versions.python",
    "versions.packages",
    "versions.accelerators",
    "machine.shared_memory",
    "machine.open_files",
    "machine.free_disk",
    "machine.cores",
    "machine.compiler_cache",
    "gpu.devices",
    "gpu.connections",
    "seams.imported_names",
    "seams.signatures",
    "seams.patches",
)
GPU_CHECKS = ("gpu.all_reduce", "gpu.toy_run")


def run(gpu: bool) -> int:
    """Print the report, a line for each finding as it is made.

    Args:
        gpu: also use the GPUs: an all-reduce over all of them, and twenty steps of a toy pair on one.

    Returns: the exit status, 1 if a line says FAIL.
    """
    levels = []
    for finding in findings([*CHECKS, *(GPU_CHECKS if gpu else ())]):
        print(finding, flush=True)
        levels.append(finding.level)
    counts = ", ".join(f"{levels.count(level)} {level}" for level in ("ok", "warn", "FAIL"))
    print(f"doctor: {counts}", flush=True)
    return int("FAIL" in levels)


def findings(checks: Sequence[str]) -> Iterator[Finding]:
    """Yield the findings, check after check; an exception becomes the last finding of its check.

    Args:
        checks: names in the form `module.function`, below `megatron_fdd.doctor`.
    """
    for check in checks:
        module, _, function = check.partition(".")
        found: list[Finding] = []
        try:
            with _silence():
                found.extend(getattr(importlib.import_module(f"megatron_fdd.doctor.{module}"), function)())
        except Exception as error:
            found.append(
                Finding("FAIL", function.replace("_", " "), f"the check ended with {first_line(error)}")
            )
        yield from found


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Suppress what Megatron and torch print when they are imported: none of it is a finding."""
    sink = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        warnings.simplefilter("ignore")
        yield
