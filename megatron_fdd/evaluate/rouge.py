"""ROUGE-L as published work computes it: stemmed, the best over the references, in percent."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any


@cache
def scorer() -> Any:
    """Return the scorer of the package rouge-score.

    Raises:
        ValueError: the package is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ValueError("ROUGE-L needs rouge-score: pip install 'megatron_fdd[evaluate]'") from error
    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(references: Iterable[str], answer: str) -> float:
    """Return the F-measure of the longest common subsequence with the reference that fits best, 0 to 100."""
    return 100 * float(scorer().score_multi(list(references), answer)["rougeL"].fmeasure)


@dataclass(frozen=True, slots=True)
class SeedScores:
    """Mean scores over the examples, by seed."""

    by_seed: dict[int, float]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.by_seed.values())

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over the seeds; None for a single one."""
        return statistics.stdev(self.by_seed.values()) if len(self.by_seed) > 1 else None
