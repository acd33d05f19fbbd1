"""Two stored teachers, each of some of the samples: every term and gradient, at every layout, against the reference."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_fdd.losses.carry import Carry
from megatron_fdd.losses.tap import TapStatistics, TokenWeights
from megatron_fdd.step.lessons import Dealing, share_of
from tests.harness.ranks import run_on_ranks
from tests.oracle.case import ENDS, STUDENT_EXPERTS, Case, assert_equal, expected, run_step, small
from tests.oracle.reference import Terms
from tests.oracle.several import SECOND

CAPPED = replace(SECOND, cap=3.0, head_bias=True)
EVERYTHING = Terms(ce=0.5, kd=0.7, alpha=1.3, beta=0.9)
# The reference asks the student once for each teacher, and would count the router's loss as often.
EXPERTS = replace(STUDENT_EXPERTS, aux_loss=0.0)
LAYOUTS = {
    "1x1": Case(terms=EVERYTHING),
    "tp2-sp": Case(tp=2, sequence_parallel=True, second=CAPPED),
    "pp2": Case(pp=2),
    "pp4-ends": Case(pp=4, terms=ENDS),
    "pp2-vpp2-tp2-sp": Case(tp=2, pp=2, vpp=2, sequence_parallel=True),
    "tp2-cp2": Case(tp=2, cp=2),
    "pp2-vpp3-cp2": Case(pp=2, vpp=3, cp=2),
    "dp2-all-tokens": Case(dp=2, terms=Terms(all_tokens=True, ce=0.5)),
    "packed": Case(packed=True),
    "packed-tp2-pp2-sp": Case(packed=True, tp=2, pp=2, sequence_parallel=True),
    "pp2-live-centred": Case(pp=2, terms=Terms(live=True, centred=True)),
    "ep2-dp2-pp2": Case(pp=2, dp=2, ep=2, student=EXPERTS, terms=EVERYTHING),
    "only-kd": Case(pp=2, terms=Terms(alpha=0.0, beta=0.0)),
}


@pytest.mark.tier("default")
@pytest.mark.parametrize("name", LAYOUTS)
def test_each_sample_has_its_own_teacher_at_every_layout(name: str) -> None:
    case = LAYOUTS[name]
    case = small(replace(case, stored="float32", second=case.second or SECOND))
    wanted, logged = expected(case), 0
    for result in run_on_ranks(run_step, case.layout, {"case": case}):
        assert_equal(result, wanted)
        if result.means:
            logged += 1
            assert {"kd code", "kd maths", "total code", "total maths", "total"} <= result.means.keys()
    assert logged


@pytest.mark.tier("default")
def test_drawn_tokens_are_each_teachers_own() -> None:
    """What is drawn is for inner layers; the final logits keep all tokens, of mixed and of cut micro-batches."""
    case = Case(packed=True, tp=2, pp=2, sequence_parallel=True, sample_tokens=0.5, sample_one_tap=True)
    case = small(replace(case, stored="float32", second=SECOND))
    wanted = expected(case).means
    found = [result.means for result in run_on_ranks(run_step, case.layout, {"case": case}) if result.means]
    assert found
    for means in found:
        for name in ("kd", "kd code", "kd maths", "ce maths"):
            assert means[name] == pytest.approx(wanted[name], rel=1e-6), name
        layers = [name for name in wanted if name.startswith("trajectory s")]
        assert any(means[name] != pytest.approx(wanted[name], rel=1e-3) for name in layers)


def batch_of(teachers: tuple[int, ...] | None, length: int, *, packed: bool = False) -> Any:
    samples = 2 if teachers is None else len(teachers)
    return SimpleNamespace(
        teachers=teachers, tokens_BS=torch.zeros(samples, length), packed=object() if packed else None
    )


def place(tensor: int = 1, rank: int = 0, *, sequence: bool = False) -> Any:
    return SimpleNamespace(tensor_size=tensor, tensor_rank=rank, sequence_parallel=sequence)


def test_the_rows_of_padded_samples_lie_alike_on_every_rank() -> None:
    """Rows are those of [S, B, H]: all samples of a position, then the next position."""
    for rank in range(2):
        share = share_of(batch_of((1, 0, 1), 4), 1, place(2, rank, sequence=True))
        assert share.samples == (0, 2)
        assert share.rows.tolist() == [0, 2, 3, 5]
        assert (share.filler, share.is_whole) == (0, False)
    assert share_of(batch_of((1, 0, 1), 4), 2, place()).samples == ()


def test_the_only_teacher_has_every_row() -> None:
    share = share_of(batch_of(None, 4), 0, place(2, 1, sequence=True))
    assert (len(share.rows), share.filler, share.is_whole) == (4, 0, True)
    packed = share_of(batch_of(None, 4, packed=True), 0, place(2, 1, sequence=True))
    assert (packed.first, len(packed.rows), packed.filler, packed.is_whole) == (4, 4, 0, True)


def test_a_rank_without_a_row_of_a_packed_sample_has_filler() -> None:
    """Three samples of 4 positions on two ranks: six rows each, the second sample on both."""
    found = [
        share_of(batch_of((0, 1, 0), 4, packed=True), 0, place(2, rank, sequence=True)) for rank in (0, 1)
    ]
    assert [share.rows.tolist() for share in found] == [[0, 1, 2, 3], [2, 3, 4, 5]]
    found = [share_of(batch_of((0, 1), 4, packed=True), 0, place(2, rank, sequence=True)) for rank in (0, 1)]
    assert [(len(share.rows), share.filler, share.first) for share in found] == [(4, 0, 0), (0, 4, 4)]
    assert not any(share.is_whole for share in found)


def test_dealt_rows_come_back_to_their_places() -> None:
    shares = [share_of(batch_of((1, 0, 1), 4), number, place()) for number in (0, 1)]
    dealing = Dealing(shares, torch.device("cpu"))
    hidden = torch.arange(24.0).view(4, 3, 2).requires_grad_()
    first, second = dealing.hidden(hidden)
    assert torch.equal(first, hidden[:, 1:2].reshape(4, 1, 2))
    assert torch.equal(second, hidden[:, ::2].reshape(8, 1, 2))
    (first.sum() + 2 * second.sum()).backward()
    assert hidden.grad is not None
    assert hidden.grad[:, :, 0].tolist() == [[2, 1, 2]] * 4
    lse = TapStatistics(torch.arange(12.0), torch.arange(12.0) + 0.5)
    dealt = dealing.carries(Carry(hidden, lse))
    back = dealing.joined(dealt, hidden)
    assert back is not None
    assert back.statistics is not None
    assert torch.equal(back.statistics.teacher_lse_N, lse.teacher_lse_N)
    assert torch.equal(back.statistics.student_lse_N, lse.student_lse_N)


def test_filler_weighs_nothing_and_has_no_label() -> None:
    shares = [
        share_of(batch_of((0, 1), 4, packed=True), number, place(2, 1, sequence=True)) for number in (0, 1)
    ]
    dealing = Dealing(shares, torch.device("cpu"))
    filled, own = dealing.weights(TokenWeights(torch.ones(4), torch.full((4,), 2.0)))
    assert filled.term_N.tolist() == [0, 0, 0, 0]
    assert own.term_N.tolist() == [2, 2, 2, 2]
    assert dealing.rows(torch.arange(4), filler=-100)[0].tolist() == [-100] * 4
    assert np.array_equal(dealing.hidden(torch.ones(4, 1, 2))[0].shape, (4, 1, 2))


def test_one_teacher_copies_nothing() -> None:
    dealing = Dealing([share_of(batch_of(None, 4), 0, place())], torch.device("cpu"))
    hidden = torch.ones(4, 2, 3)
    assert dealing.hidden(hidden)[0] is hidden
