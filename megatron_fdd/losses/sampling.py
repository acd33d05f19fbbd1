"""Approximations of the inner terms, off by default: a random part of the tokens, one random tap a step.

Both are unbiased: what is looked at counts for what is not. Every draw follows from the seed, the iteration and the
place of the rows, so that all ranks that need the same draw make it by themselves, and a resumed run makes it again.

Shapes: S sequence (this rank's part), B micro-batch, H hidden, N = S*B token rows of this rank,
M rows of them that are looked at.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fdd.config import FddConfig
from megatron_fdd.losses.tap import TapStatistics, TokenWeights
from megatron_fdd.losses.terms import compares_taps, first_tap


@dataclass(frozen=True, slots=True)
class RowSample:
    """The token rows of a micro-batch that the terms of inner layers look at.

    Attributes:
        weights: of those rows. They hold, beside the mask, how much each row and tap counts for others.
        index_M: which rows, ascending; None: all.
        num_rows: N.
    """

    weights: TokenWeights
    index_M: Tensor | None
    num_rows: int

    def hidden(self, hidden_SBH: Tensor) -> Tensor:
        """Return these rows of hidden states, [M, 1, H]; the whole tensor if all rows are looked at."""
        if self.index_M is None:
            return hidden_SBH
        return hidden_SBH.flatten(0, 1).index_select(0, self.index_M)[:, None]

    def gather(self, statistics: TapStatistics | None) -> TapStatistics | None:
        """Take these rows, [N] -> [M], out of the statistics that another stage sent."""
        if statistics is None or self.index_M is None:
            return statistics
        return TapStatistics(
            statistics.teacher_lse_N.index_select(0, self.index_M),
            statistics.student_lse_N.index_select(0, self.index_M),
        )

    def scatter(self, statistics: TapStatistics | None) -> TapStatistics:
        """Put statistics back, [M] -> [N], to send them on; 0 in rows, or for a tap, that no stage looks at."""
        zero_N = torch.zeros(self.num_rows, dtype=torch.float32, device=self.weights.term_N.device)
        if statistics is None:
            return TapStatistics(zero_N, zero_N)
        if self.index_M is None:
            return statistics
        return TapStatistics(
            zero_N.index_copy(0, self.index_M, statistics.teacher_lse_N),
            zero_N.index_copy(0, self.index_M, statistics.student_lse_N),
        )


@dataclass(frozen=True, slots=True)
class StepDraw:
    """The tokens and taps that the inner terms of a step look at; the default is all of them.

    Attributes:
        tap: index of the only pair whose terms are computed.
        factor: how often these count.
        with_previous: a term compares a tap with the one before it, so that one is looked at too.
        token_fraction: which part of each micro-batch's rows.
        key: what the rows follow from, with the index of the micro-batch.
    """

    tap: int | None = None
    factor: int = 1
    with_previous: bool = True
    token_fraction: float = 1.0
    key: tuple[int, ...] = ()

    def counts(self, pair: int) -> bool:
        """Whether the terms of this pair are computed."""
        return self.tap is None or pair == self.tap

    def looks_at(self, pair: int) -> bool:
        """Whether this pair's terms are computed, or one that compares the next pair with it."""
        return self.counts(pair) or (self.with_previous and self.counts(pair + 1))

    @property
    def compares(self) -> bool:
        """Whether any tap is compared with the one before it: the first pair has none."""
        return self.with_previous and self.tap != 0

    def rows(self, weights: TokenWeights, micro_batch: int) -> RowSample:
        """Choose this rank's rows of a micro-batch: ceil(fraction * N) of them, first those that count.

        If C rows count and M < C are looked at, each counts C/M times; C stays on the device. The same rows for
        every tap, so that log-sum-exps of two taps belong together, also across pipeline stages.
        """
        term_N = weights.term_N
        if self.token_fraction == 1.0:
            if self.tap is not None:
                term_N = term_N * self.factor
            return RowSample(TokenWeights(weights.label_N, term_N), None, len(term_N))
        num_drawn = math.ceil(self.token_fraction * len(term_N))
        scores_N = random_scores(len(term_N), (*self.key, micro_batch), term_N.device)
        counts_N = term_N > 0
        index_M = (scores_N + counts_N).topk(num_drawn, sorted=False).indices.sort().values
        factor = (counts_N.sum() / num_drawn).clamp(min=1) * self.factor
        drawn_M = (part.index_select(0, index_M) for part in (weights.label_N, term_N * factor))
        return RowSample(TokenWeights(*drawn_M), index_M, len(term_N))


EVERYTHING = StepDraw()


class Sampler:
    """A source of draws, one for each training step.

    Args:
        num_pairs: of the run.
        seed: Megatron's.
        place: number of this rank among those whose token rows differ (`Topology.rows_rank`).
    """

    def __init__(self, config: FddConfig, num_pairs: int, *, seed: int, place: int) -> None:
        self._config = config
        self._taps = range(first_tap(config), num_pairs)
        self._seed = seed
        self._place = place

    def draw(self, iteration: int) -> StepDraw:
        """Draw for step `iteration` (0-based). The tap is the same on every rank."""
        config = self._config
        if config.is_exact or not self._taps:
            return EVERYTHING
        tap = None
        if config.sample_one_tap:
            tap = random.Random(f"tap {self._seed} {iteration}").choice(self._taps)
        return StepDraw(
            tap=tap,
            factor=1 if tap is None else len(self._taps),
            with_previous=compares_taps(config),
            token_fraction=config.sample_tokens,
            key=(self._seed, iteration, self._place),
        )


def random_scores(num_rows: int, key: tuple[int, ...], device: torch.device) -> Tensor:
    """Draw uniform numbers in [0, 1), float64 [N] so that no two are equal, on the host: alike on any device."""
    generator = torch.Generator().manual_seed(random.Random(f"rows {key}").getrandbits(32))
    scores_N = torch.rand(num_rows, generator=generator, dtype=torch.float64)
    if device.type == "cuda":
        scores_N = scores_N.pin_memory()  # so that the copy does not make the host wait
    return scores_N.to(device, non_blocking=True)
