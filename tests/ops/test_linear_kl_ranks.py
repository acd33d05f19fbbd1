"""linear_kl over tensor-parallel ranks: it equals the reference at any size, with the documented collectives."""

from __future__ import annotations

import itertools
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fdd.ops.linear_kl import Divergence, Implementation
from megatron_fdd.ops.torch_sweeps import TorchSweeps
from megatron_fdd.ops.vocab_shard import Pending, VocabShard
from tests.harness.ranks import distributed
from tests.ops.collectives import Copied, expect
from tests.ops.linear_kl_case import KINDS, RankPart, error, gradients, loss, make_case, tiles

PATHS = (tiles(5), tiles(5, block_rows=4), Implementation("reference"))


def assert_matches_reference(
    num_tokens: int, vocab_size: int, padded: int, *, sequence_parallel: bool
) -> None:
    """Compare outputs and gradients of this rank's part for every divergence and both kinds of head, in float64."""
    case = make_case(num_tokens, vocab_size, padded=padded)
    part = RankPart.of(case, sequence_parallel=sequence_parallel)
    full = make_case(num_tokens, vocab_size, padded=padded)
    leaves = full.student.requires_grad_(), full.student_head.requires_grad_()
    for kind in KINDS:
        for temperature in (1.0, 2.0):
            divergence = Divergence(kind, temperature=temperature)
            expected = full.reference(divergence)
            expected_gradients = gradients(loss(expected, full.upstream), *leaves)
            own_gradients = expected_gradients[0][part.tokens], expected_gradients[1][part.rows]
            for live, implementation in itertools.product((False, True), PATHS):
                inputs = part.inputs(live=live)
                outputs = part.run(*inputs, divergence, implementation=implementation)
                for value, reference in zip(outputs, expected, strict=True):
                    assert error(value, reference[part.tokens]) < 1e-12, (kind, temperature, live)
                total = loss(outputs, case.upstream[:, part.tokens])
                ours = gradients(total, *inputs[: 1 + live])
                for gradient, reference in zip(ours, own_gradients[: 1 + live], strict=True):
                    assert error(gradient, reference) < 1e-12, (kind, temperature, live)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@distributed(ranks=2)
def test_two_ranks(sequence_parallel: bool) -> None:
    assert_matches_reference(6, 31, 32, sequence_parallel=sequence_parallel)
    assert_matches_reference(2, 3, 4, sequence_parallel=sequence_parallel)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@distributed(ranks=3)
def test_three_ranks_with_uneven_vocabulary(sequence_parallel: bool) -> None:
    assert_matches_reference(6, 23, 30, sequence_parallel=sequence_parallel)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@distributed(ranks=4)
def test_four_ranks_one_of_them_all_padding(sequence_parallel: bool) -> None:
    assert_matches_reference(4, 10, 16, sequence_parallel=sequence_parallel)
    assert (
        RankPart.of(make_case(4, 10, padded=16), sequence_parallel=False).shard.num_valid
        == ([4, 4, 2, 0][dist.get_rank()])
    )


@pytest.mark.parametrize("sequence_parallel", [False, True])
@distributed(ranks=3)
def test_a_label_that_no_rank_has(sequence_parallel: bool) -> None:
    """The cross-entropy is NaN on every rank that has the token; the last rank has nothing but padding."""
    case = make_case(6, 16, padded=24)
    case.labels[:] = torch.tensor([0, 16, 15, -100, 23, 99])
    part = RankPart.of(case, sequence_parallel=sequence_parallel)
    right = [False, True, False, False, True, True][part.tokens]
    for implementation in PATHS:
        outputs = part.run(*part.inputs(live=True), Divergence("fkl"), implementation=implementation)
        assert outputs.cross_entropy_N.isnan().tolist() == right


@distributed(ranks=2)
def test_no_tokens_without_sequence_parallelism() -> None:
    part = RankPart.of(make_case(0, 10, padded=12), sequence_parallel=False)
    for kind in ("fkl", "jsd"):
        hidden, head = part.inputs(live=True)
        outputs = part.run(hidden, head, Divergence(kind))
        assert all(output.shape == (0,) for output in outputs)
        assert not gradients(loss(outputs, part.case.upstream), hidden, head)[1].any()


class _Gathered(torch.autograd.Function):
    """Gather of all ranks' tokens; every rank has the whole loss, so that each takes back only its own part."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("kind", ["fkl", "rkl", "jsd"])
@distributed(ranks=2)
def test_gradcheck(kind: str, sequence_parallel: bool) -> None:
    case = make_case(2, 5, padded=6)
    part = RankPart.of(case, sequence_parallel=sequence_parallel)

    def outputs(student: Tensor, *trained: Tensor) -> tuple[Tensor, ...]:
        head = Copied.apply(trained[0]) if trained else case.student_head
        student = Copied.apply(student) if sequence_parallel else student
        result = part.run(student[part.tokens], head[part.rows], Divergence(kind), implementation=tiles(2))
        fields = (result.divergence_N, result.student_lse_N, result.cross_entropy_N)
        return tuple(_Gathered.apply(field) if sequence_parallel else field for field in fields)

    student, head = case.student.requires_grad_(), case.student_head.clone().requires_grad_()
    assert torch.autograd.gradcheck(outputs, (student,))
    assert torch.autograd.gradcheck(outputs, (student, head))


@pytest.mark.parametrize("live", [False, True])
@distributed(ranks=2)
def test_collectives(live: bool) -> None:
    """There are 4 tokens of student width 7, in float32."""
    case = make_case(4, 30, padded=32).to(torch.float32)
    part = RankPart.of(case, sequence_parallel=False)
    plain = {"needs_lse": False}
    for divergence, options, columns, extra in (
        (Divergence("fkl"), plain, 6, []),  # 5, and 1 for the labels
        (Divergence("rkl", temperature=2.0), plain, 8, []),
        (Divergence("jsd"), plain, 5, [("allreduce", 4 * 2 * 4)]),
        (None, {}, 5, []),
    ):
        hidden, head = part.inputs(live=live)
        with expect([("allgather_base", 4 * columns * 4), *extra]):
            outputs = part.run(hidden, head, divergence, **options)
        with expect([("allreduce", 4 * 4 * 7)]):
            loss(outputs, case.upstream).backward()


@pytest.mark.parametrize("live", [False, True])
@distributed(ranks=2)
def test_collectives_with_sequence_parallelism(live: bool) -> None:
    """A rank has 2 of 4 tokens; teacher width 12, student width 7, bf16; labels are 8 bytes wide."""
    case = make_case(4, 30, padded=32).to(torch.bfloat16)
    part = RankPart.of(case, sequence_parallel=True)
    hidden, head = part.inputs(live=live)
    gathers = [2 * 2 * 7, 2 * 2 * 12, 2 * 8, 4 * 6 * 4]  # student, teacher, labels, statistics
    with expect([("allgather_base", size) for size in gathers]):
        outputs = part.run(hidden, head, Divergence())
    total = loss(outputs, case.upstream[:, part.tokens])
    with expect([("allgather_base", 2 * 3 * 4), ("reduce_scatter_base", 4 * 7 * 2)]):
        total.backward()


@distributed(ranks=2)
def test_collectives_are_under_way_during_the_neighbours_products() -> None:
    """With two blocks of tokens and a trained head, collectives begin and are waited for in this order."""
    part = RankPart.of(make_case(8, 10, padded=12), sequence_parallel=True)
    events: list[str] = []

    def noted(owner: type, name: str, event: str) -> Any:
        original = getattr(owner, name)

        def call(self: Any, *arguments: Any) -> Any:
            if event != "wait" or self._work is not None:
                events.append(event)
            return original(self, *arguments)

        return patch.object(owner, name, call)

    with (
        noted(VocabShard, "start_stack", "begin"),
        noted(VocabShard, "start_reduce", "begin"),
        noted(Pending, "wait", "wait"),
        noted(TorchSweeps, "softmax_sums", "sweep"),
        noted(TorchSweeps, "gradients", "sweep"),
    ):
        hidden, head = part.inputs(live=True)
        outputs = part.run(hidden, head, Divergence(), implementation=tiles(5, block_rows=4))
        forward = events.copy()
        events.clear()
        loss(outputs, part.case.upstream[:, part.tokens]).backward()
    gather = ["begin"] * 3  # student, teacher, labels
    first = [*gather, *gather, "wait", "wait", "wait", "sweep", "begin"]
    assert forward == [*first, "wait", "wait", "wait", "sweep", "begin", "wait", "wait"]
    assert events == ["begin", "wait", "sweep", "begin", "sweep", "begin", "wait", "wait"]
