"""Collectives that do nothing until `wait`: they show that no result is read and no input overwritten too early.

Over gloo a collective often ends before its `wait`; over NCCL it runs beside the work that follows. Here each fills
its output with NaN (integers: the smallest number) when it begins. It runs in `wait`, after a check that its inputs
have not changed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fdd.ops import vocab_shard
from megatron_fdd.ops.capped_change import capped_change
from megatron_fdd.ops.delta import delta_cosine, head_grams
from megatron_fdd.ops.head_loss import LossWeights, head_loss
from megatron_fdd.ops.implementation import Implementation
from megatron_fdd.ops.inner_loss import InnerLayer, InnerTerms, inner_loss
from megatron_fdd.ops.linear_kl import Divergence
from tests.harness.late import Late
from tests.harness.ranks import distributed
from tests.ops.linear_kl_case import KINDS, RankPart, capped, gradients, loss, make_case, tiles


def poison(tensor: Tensor) -> float:
    """Return a value that no result has."""
    return float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min


def is_poisoned(tensor: Tensor) -> bool:
    return bool((tensor.isnan() if tensor.is_floating_point() else tensor == poison(tensor)).all())


@dataclass(slots=True)
class LateCollectives:
    """Late versions of the asynchronous collectives that the operations use, with a count of calls."""

    count: int = 0

    @contextlib.contextmanager
    def installed(self) -> Iterator[LateCollectives]:
        with contextlib.ExitStack() as stack:
            for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
                late = self._into_output(getattr(dist, name))
                stack.enter_context(patch.object(vocab_shard.dist, name, late))
            stack.enter_context(patch.object(vocab_shard.dist, "all_reduce", self._in_place(dist.all_reduce)))
            yield self

    def _into_output(self, collective: Callable[..., object]) -> Callable[..., Late | None]:
        def begin(out: Tensor, given: Tensor, group: object = None, async_op: bool = False) -> Late | None:
            before = given.clone()
            out.fill_(poison(out))

            def finish() -> None:
                is_same = torch.equal(given.nan_to_num(), before.nan_to_num())  # NaN: a label elsewhere
                assert is_same, "an input changed before its collective was waited for"
                assert is_poisoned(out), "an output was written before its collective was waited for"
                collective(out, before, group=group)

            return self._begun(finish, async_op)

        return begin

    def _in_place(self, collective: Callable[..., object]) -> Callable[..., Late | None]:
        def begin(tensor: Tensor, group: object = None, async_op: bool = False) -> Late | None:
            before = tensor.clone()
            tensor.fill_(poison(tensor))

            def finish() -> None:
                assert is_poisoned(tensor), "a sum was written before its collective was waited for"
                collective(before, group=group)
                tensor.copy_(before)

            return self._begun(finish, async_op)

        return begin

    def _begun(self, finish: Callable[[], None], async_op: bool) -> Late | None:
        self.count += 1
        if async_op:
            return Late(finish)
        finish()
        return None


Step = Callable[[], tuple[Tensor, ...]]


def assert_the_same_when_late(step: Step, at_least: int) -> None:
    """Assert that late and immediate collectives give the same numbers."""
    at_once = step()
    with LateCollectives().installed() as late:
        results = step()
    assert late.count >= at_least
    for result, wanted in zip(results, at_once, strict=True):
        assert torch.equal(result, wanted)


def linear_kl_step(
    part: RankPart, divergence: Divergence, implementation: Implementation, *, live: bool
) -> Step:
    """Return outputs and gradients of this rank's part."""

    def step() -> tuple[Tensor, ...]:
        inputs = part.inputs(live=live)
        outputs = part.run(*inputs, divergence, implementation=implementation)
        total = loss(outputs, part.case.upstream[:, part.tokens])
        return (*outputs, *gradients(total, *inputs[: 1 + live]))

    return step


def head_loss_step(part: RankPart, divergence: Divergence) -> Step:
    """Return a step that holds so few logits that every rank has several blocks."""
    case = part.case
    weights = LossWeights(case.upstream[0][part.tokens], case.upstream[2][part.tokens], 0.7, 0.3)

    def step() -> tuple[Tensor, ...]:
        hidden, head = part.inputs(live=True)
        result = head_loss(
            case.teacher[part.tokens],
            hidden,
            part.heads(head, Implementation("torch", held_logits=4 * len(head))),
            divergence=divergence,
            labels_N=case.labels[part.tokens],
            weights=weights,
        )
        assert result.divergence is not None
        assert result.cross_entropy is not None
        return (*result, *gradients(result.loss, hidden, head))

    return step


def delta_step(part: RankPart, *, centred: bool) -> Step:
    """Return Gram matrices, cosines, and their gradients for features and head."""
    case = part.case

    def step() -> tuple[Tensor, ...]:
        student, head = part.inputs(live=True)
        grams = head_grams(part.heads(head))
        lse_N = torch.linspace(-1, 2, len(student), dtype=student.dtype)
        given = (None, None) if centred else (lse_N, 2 * lse_N)
        cosine_N = delta_cosine(case.teacher[part.tokens], student, *given, grams)
        return (cosine_N, *gradients(cosine_N.sum(), student, head))

    return step


def inner_loss_step(part: RankPart, divergence: Divergence) -> Step:
    """Return a step of two layers, of which so few logits are held that every rank has several blocks."""
    teacher_NT, weights_N = part.case.teacher[part.tokens], part.case.upstream[0][part.tokens]

    def step() -> tuple[Tensor, ...]:
        student, head = part.inputs(live=False)
        heads = part.heads(head, Implementation("torch", held_logits=2 * 4 * len(head)))
        layers = [InnerLayer(teacher_NT, student, 0.7), InnerLayer(2 * teacher_NT, student.flip(1), 0.7, 0.4)]
        total, sums = inner_loss(layers, heads, head_grams(heads), InnerTerms(divergence, weights_N))
        values = [value for each in sums for value in each if value is not None]
        return (total, *values, *gradients(total, student))

    return step


def capped_change_step(part: RankPart) -> Step:
    """Return the teacher's capped change, in several tiles, and its gradient for the student's head."""
    teacher_NT = part.case.teacher[part.tokens].float()

    def step() -> tuple[Tensor, ...]:
        _, head = part.inputs(live=True)
        heads = part.heads(head, tiles(5, block_rows=4))
        change = capped_change(teacher_NT, 2 * teacher_NT, heads, head_grams(heads))
        return (*change, *gradients(change.on_student_nD.sum(), head))

    return step


def assert_all_operations(*, sequence_parallel: bool) -> None:
    """Run all operations on twelve tokens in blocks of 4 with tiles of 5; the last rank's rows have padding."""
    size = dist.get_world_size()
    part = RankPart.of(make_case(12, 31, padded=36 if size == 3 else 32), sequence_parallel=sequence_parallel)
    for divergence in (*map(Divergence, KINDS), Divergence(temperature=2.0)):
        for live in (False, True):
            step = linear_kl_step(part, divergence, tiles(5, block_rows=4), live=live)
            assert_the_same_when_late(step, at_least=6)
        assert_the_same_when_late(head_loss_step(part, divergence), at_least=4)
        assert_the_same_when_late(inner_loss_step(part, divergence), at_least=8)
    for centred in (False, True):
        assert_the_same_when_late(delta_step(part, centred=centred), at_least=2)
    capped_part = replace(part, case=capped(part.case))
    assert_the_same_when_late(capped_change_step(capped_part), at_least=3)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@distributed(ranks=2)
def test_two_ranks(sequence_parallel: bool) -> None:
    assert_all_operations(sequence_parallel=sequence_parallel)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@distributed(ranks=3)
def test_three_ranks(sequence_parallel: bool) -> None:
    assert_all_operations(sequence_parallel=sequence_parallel)


def dont_wait(self: vocab_shard.Pending) -> Tensor:
    return self._tensor


@distributed(ranks=2)
def test_a_missing_wait_is_noticed() -> None:
    part = RankPart.of(make_case(12, 31, padded=32), sequence_parallel=False)
    step = linear_kl_step(part, Divergence(), tiles(5, block_rows=4), live=False)
    step()
    with (
        LateCollectives().installed(),
        patch.object(vocab_shard.Pending, "wait", dont_wait),
    ):
        results = step()
    assert any(result.isnan().any() for result in results)
