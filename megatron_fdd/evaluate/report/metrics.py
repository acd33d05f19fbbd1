"""Metrics files (`--fdd-metrics-file`) as curves, and curves as means over bins of iterations."""

from __future__ import annotations

import json
import math
import re
from array import array
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from megatron_fdd.host.field_kinds import number, whole
from megatron_fdd.losses.terms import VALIDATION

TOTAL = "total"
_PAIR = r"s\d+:t\d+"
# The key of a term at one layer pair.
_OF_A_LAYER = rf"\S+ {_PAIR}"
TOKENS_PER_SECOND = "tokens per second"
# Sums of a million such numbers stay finite.
NUMBER = number(-1e300, 1e300)
_ITERATION = whole(0, 10**15)


@dataclass(frozen=True, slots=True)
class Curve:
    """One number over training, without values that are not finite or no `NUMBER`.

    Attributes:
        iterations: int64 [points], ascending.
        values: float64 [points].
    """

    iterations: NDArray[np.int64]
    values: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True, slots=True)
class Bins:
    """A curve summed up in bins of iterations; each array has one entry for every bin that has a value."""

    index: NDArray[np.int64]
    centre: NDArray[np.float64]
    mean: NDArray[np.float64]
    lowest: NDArray[np.float64]
    highest: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Metrics:
    """The contents of a metrics file.

    Attributes:
        curves: one for each key of the file; a key without any finite value is left out.
        first, last: the first and the last iteration.
        is_cut: true if the last line is unfinished: the run was killed while it wrote the line, or is writing it now.
    """

    curves: dict[str, Curve]
    first: int
    last: int
    is_cut: bool

    @property
    def num_iterations(self) -> int:
        """Number of iterations from the first to the last."""
        return self.last - self.first + 1

    def layer_pairs(self, term: str) -> list[str]:
        """Return "s4:t9" of every layer pair of a term such as "trajectory", from the first to the last block."""
        pairs = [re.fullmatch(rf"{re.escape(term)} ({_PAIR})", key) for key in self.curves]
        return sorted((found[1] for found in pairs if found), key=_block_numbers)

    @property
    def has_gaps(self) -> bool:
        """Whether some steps lack a value of some layer (`--fdd-sample-one-tap`)."""
        return any(
            len(curve) < len(self.curves.get(key.split()[0], ()))
            for key, curve in self.curves.items()
            if re.fullmatch(_OF_A_LAYER, key)
        )


def read_metrics(path: Path) -> Metrics:
    """Read a metrics file, which may be growing; an unfinished last line is dropped.

    Raises:
        ValueError: a line before the last is malformed, a line is not a record, or there is no record.
    """
    columns: dict[str, tuple[array[int], array[float]]] = defaultdict(lambda: (array("q"), array("d")))
    first = last = num_records = 0
    malformed = None
    with path.open(encoding="utf-8", errors="replace") as file:
        lines = tqdm(file, desc=str(path), unit=" lines", leave=False, disable=None)
        for place, line in enumerate(lines, start=1):
            if malformed is not None:
                raise malformed
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:  # also an integer with thousands of digits
                cause = error.msg if isinstance(error, json.JSONDecodeError) else "too long or too deep"
                malformed = ValueError(f"{path}, line {place}: malformed JSON ({cause})")
                continue
            if not isinstance(record, dict) or not _ITERATION.fits(record.get("iteration")):
                raise ValueError(
                    f'{path}, line {place}: not an object with an "iteration": is it a metrics file?'
                )
            if record["iteration"] < last:
                raise ValueError(
                    f"{path}, line {place}: iteration {record['iteration']} comes after {last}; "
                    "keep the lines of one run"
                )
            last = record["iteration"]
            first = first if num_records else last
            num_records += 1
            for key, value in record.items():
                if NUMBER.fits(value):
                    iterations, values = columns[key]
                    iterations.append(last)
                    values.append(value)
    if not num_records:
        raise ValueError(f"{path} holds no finished record: train for at least one iteration")
    curves = {key: Curve(np.array(i), np.array(v)) for key, (i, v) in columns.items()}
    if not any(key.removeprefix(VALIDATION) == TOTAL for key in curves):
        raise ValueError(f'{path} holds no "total": is it a metrics file?')
    return Metrics(_with_pace(curves), first, last, malformed is not None)


def in_digits(value: float, digits: int = 4) -> str:
    """Return a number with at least `digits` significant digits, and with an exponent only if it is very small."""
    if abs(value) >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}" if abs(value) < 1e-4 else f"{value:#.{digits}g}".rstrip(".")


def bin_width(longest: int, most_bins: int) -> int:
    """Return the number of iterations in a bin with which `longest` iterations make at most `most_bins` bins."""
    return max(1, math.ceil(longest / most_bins))


def cut_into_bins(curve: Curve, width: int) -> Bins:
    """Cut a curve into bins; bin 0 holds iterations 1 to `width`. Width 1 leaves the curve unchanged."""
    index, starts, counts = np.unique((curve.iterations - 1) // width, return_index=True, return_counts=True)
    values = curve.values
    return Bins(
        index=index,
        centre=np.add.reduceat(curve.iterations, starts) / counts,
        mean=np.add.reduceat(values, starts) / counts,
        lowest=np.minimum.reduceat(values, starts),
        highest=np.maximum.reduceat(values, starts),
    )


def _with_pace(curves: dict[str, Curve]) -> dict[str, Curve]:
    tokens, seconds = curves.get("tokens"), curves.get("seconds")
    if tokens is None or seconds is None or not np.array_equal(tokens.iterations, seconds.iterations):
        return curves
    pace = tokens.values / np.maximum(seconds.values, 1e-9)
    return {**curves, TOKENS_PER_SECOND: Curve(tokens.iterations, pace)}


def _block_numbers(pair: str) -> tuple[int, ...]:
    """Return (4, 9) for "s4:t9"."""
    return tuple(int(digits) for digits in "".join(c if c.isdecimal() else " " for c in pair).split())
