"""The draws of tokens and taps: what they depend on, how much they count, and what they leave unchanged."""

from __future__ import annotations

import itertools
import math
import random
from unittest.mock import patch

import torch

from megatron_fdd.config import FddConfig
from megatron_fdd.losses import sampling
from megatron_fdd.losses.sampling import EVERYTHING, RowSample, Sampler, StepDraw
from megatron_fdd.losses.tap import TapStatistics, TokenWeights


def test_every_row_counts_on_average_what_it_weighs() -> None:
    """The mean is over all orders in which rows can be drawn; all terms are linear in the weights."""
    num_rows, label_N = 5, torch.ones(5)
    for mask in ([1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]):
        weight_N = torch.tensor(mask, dtype=torch.float32)
        for fraction in (0.1, 0.4, 0.5, 0.8):
            draw = StepDraw(token_fraction=fraction, tap=1, factor=3)
            total_N, exact = torch.zeros(num_rows), True
            orders = list(itertools.permutations(range(num_rows)))
            for order in orders:
                scores_N = torch.tensor(order, dtype=torch.float64) / num_rows
                with patch.object(sampling, "random_scores", lambda *_, scores=scores_N: scores):
                    sample = draw.rows(TokenWeights(label_N, weight_N), 0)
                assert sample.index_M is not None
                assert len(sample.index_M) == math.ceil(fraction * num_rows)
                spread_N = torch.zeros(num_rows).index_copy(0, sample.index_M, sample.weights.term_N)
                exact &= torch.equal(spread_N, 3 * weight_N)
                total_N += spread_N
            torch.testing.assert_close(total_N / len(orders), 3 * weight_N)
            assert exact == (sum(mask) <= math.ceil(fraction * num_rows))


def test_draws_follow_from_seed_iteration_micro_batch_and_place_alone() -> None:
    config = FddConfig(teacher_load="T", sample_tokens=0.3, sample_one_tap=True)
    weights = TokenWeights(torch.ones(40), torch.ones(40))

    def rows(seed: int, iteration: int, place: int, micro_batch: int) -> tuple[int, ...]:
        draw = Sampler(config, 4, seed=seed, place=place).draw(iteration)
        return tuple(draw.rows(weights, micro_batch).index_M.tolist())

    states = torch.get_rng_state(), random.getstate()
    places = list(itertools.product(range(2), repeat=4))
    drawn = {place: rows(*place) for place in places}
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    torch.manual_seed(5)
    assert drawn == {place: rows(*place) for place in places}
    assert len(set(drawn.values())) == len(places)
    taps = [[Sampler(config, 4, seed=9, place=p).draw(i).tap for i in range(400)] for p in (0, 1)]
    assert taps[0] == taps[1]
    for tap in range(4):  # 100 each on average, with a standard deviation of 8.7
        assert 65 <= taps[0].count(tap) <= 135


def test_rows_of_a_carry_return_to_their_places() -> None:
    index_M, lse_N = torch.tensor([1, 4]), torch.arange(6.0)
    sample = RowSample(TokenWeights(lse_N[:2], lse_N[:2]), index_M, 6)
    kept = sample.gather(TapStatistics(lse_N, 10 * lse_N))
    assert kept is not None
    spread = sample.scatter(kept)
    assert spread.teacher_lse_N.tolist() == [0, 1, 0, 0, 4, 0]
    assert spread.student_lse_N.tolist() == [0, 10, 0, 0, 40, 0]
    assert not any(
        each.any() for each in (sample.scatter(None).teacher_lse_N, sample.scatter(None).student_lse_N)
    )


def test_off_is_what_there_was_before() -> None:
    assert Sampler(FddConfig(teacher_load="T"), 4, seed=1, place=0).draw(3) is EVERYTHING
    weights, hidden, lse = TokenWeights(torch.ones(6), torch.ones(6)), torch.ones(3, 2, 4), torch.ones(6)
    statistics = TapStatistics(lse, lse)
    with patch.object(torch, "Generator", side_effect=AssertionError):
        sample = EVERYTHING.rows(weights, 0)
    assert sample.hidden(hidden) is hidden
    assert sample.gather(statistics) is statistics
    assert sample.scatter(statistics) is statistics
    assert sample.weights.term_N is weights.term_N
