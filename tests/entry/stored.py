"""Commands of a producer, and of a training that reads what it stored."""

from __future__ import annotations

from pathlib import Path

from tests.entry.conftest import Toys

EVALUATION = "--eval-iters 1".split()
# Sums in another order.
RELATIVE = 2e-6


def teach(toy: Toys, store: Path, *more: object) -> list[str]:
    """Return the command of a producer for the data of `stored_run`."""
    own = ("--engine", "megatron", "--teacher", toy.teacher, "--store", store, "--form", "float32")
    return ["teach", *map(str, own), *toy.command(*EVALUATION, *more)]


def stored_run(toy: Toys, store: Path, metrics: Path, *more: object) -> list[str]:
    """Return the command of a training that reads a store."""
    live = toy.command(*EVALUATION, "--fdd-metrics-file", metrics, *more)
    at = live.index("--teacher-load")
    return [*live[:at], "--fdd-teacher-store", str(store), *live[at + 2 :]]
