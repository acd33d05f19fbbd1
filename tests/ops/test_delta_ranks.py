"""The delta over tensor-parallel ranks: it follows the definition at any size, with the documented collectives."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fdd.ops.delta import delta_cosine, head_grams
from megatron_fdd.ops.linear_kl import Heads, VocabShard
from tests.harness.ranks import distributed
from tests.ops.collectives import Copied, expect
from tests.ops.delta_case import leaves, make_layers
from tests.ops.linear_kl_case import RankPart, error, gradients, make_case


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize(("vocab_size", "padded"), [(23, 24), (5, 8)])
@distributed(ranks=4)
def test_ranks_agree_with_the_definition(
    vocab_size: int, padded: int, sequence_parallel: bool, centred: bool, detached: bool
) -> None:
    """At (5, 8) the ranks have 2, 2, 1 and 0 valid rows."""
    layers = make_layers(8, vocab_size, padded=padded, dtype=torch.float64)
    case = layers.earlier
    part = RankPart.of(case, sequence_parallel=sequence_parallel)
    head = case.student_head.detach()[part.rows].clone().requires_grad_()
    grams = head_grams(part.heads(head))
    assert grams.vocab_size == vocab_size
    reference = layers.reference(centred=centred, detached=detached)
    weights = torch.linspace(1, 2, 8, dtype=torch.float64)
    *states, _ = trained = leaves(layers)[detached:]
    *expected, expected_head = gradients((weights * reference).sum(), *trained)
    # The log-sum-exps depend on the head too; here their share is in the gradient of the whole head.
    whole_head = case.student_head
    cosine = layers.cosine(grams, part.tokens, centred=centred, detached=detached)
    assert error(cosine, reference[part.tokens]) < 1e-12
    *found, through_lse, through_grams = torch.autograd.grad(
        (weights[part.tokens] * cosine).sum(), (*states, whole_head, head), allow_unused=True
    )
    for gradient, wanted in zip(found, expected, strict=True):
        assert error(gradient[part.tokens], wanted[part.tokens]) < 1e-12
    through_lse = torch.zeros_like(whole_head) if through_lse is None else through_lse
    if sequence_parallel:
        dist.all_reduce(through_lse)
    assert error(through_grams + through_lse[part.rows], expected_head[part.rows]) < 1e-11


def assert_equals_one_rank(num_tokens: int, *, centred: bool) -> None:
    """Compare values and gradients of all tokens on every rank; token 1 has no difference, token 2 does not count."""
    results = []
    for one_rank in (True, False):
        case = make_case(num_tokens, 23, padded=24 if dist.get_world_size() == 2 else 27)
        part = RankPart.of(case, sequence_parallel=False)
        shard = VocabShard(0, 23, None) if one_rank else part.shard
        rows = slice(None) if one_rank else part.rows
        lse = [torch.linspace(-1, factor, num_tokens, dtype=torch.float64) for factor in (2, 3)]
        for tensor in (case.student, *lse):
            tensor[1:2] = 0
        head = case.student_head[rows].clone()
        student, student_lse = case.student, lse[1]
        for leaf in (student, student_lse, head):
            leaf.requires_grad_()
        grams = head_grams(Heads(case.teacher_head[rows], head, shard))
        lse_deltas = (None, None) if centred else (lse[0], student_lse)
        cosine = delta_cosine(case.teacher, student, *lse_deltas, grams)
        weights = torch.linspace(1, 2, num_tokens)
        weights[2:3] = 0
        *body, head_gradient = gradients(
            (weights * cosine).sum(), student, *([] if centred else [student_lse]), head
        )
        assert all(tensor.is_contiguous() for tensor in body[:1])
        for tensor in body:
            assert not tensor[1:3].any()
        results.append((cosine, *body, head_gradient[part.rows] if one_rank else head_gradient))
    for expected, ours in zip(*results, strict=True):
        assert error(ours, expected) < 1e-13


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1, 4, 7])
@distributed(ranks=2)
def test_two_ranks_share_tokens(num_tokens: int, centred: bool) -> None:
    assert_equals_one_rank(num_tokens, centred=centred)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 4, 7])
@distributed(ranks=3)
def test_three_ranks_share_tokens(num_tokens: int, centred: bool) -> None:
    """With 4 tokens the shares are 2, 2 and 0."""
    assert_equals_one_rank(num_tokens, centred=centred)


@pytest.mark.parametrize("centred", [False, True])
@distributed(ranks=2)
def test_gradcheck(centred: bool) -> None:
    case = make_case(3, 5, padded=6)
    part = RankPart.of(case, sequence_parallel=False)
    lse = [torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64) for _ in range(2)]

    def cosine(student: Tensor, student_lse: Tensor, head: Tensor) -> Tensor:
        head = Copied.apply(head)[part.rows]
        grams = head_grams(part.heads(head))
        lse_deltas = (None, None) if centred else (lse[0], student_lse)
        return delta_cosine(case.teacher, student, *lse_deltas, grams)

    inputs = [tensor.requires_grad_() for tensor in (case.student, lse[1], case.student_head)]
    assert torch.autograd.gradcheck(cosine, inputs)


@distributed(ranks=2)
def test_collectives() -> None:
    """Here T = 12, D = 7, in float32; 5 tokens (3 for a rank), or 2 for each rank under sequence parallelism."""
    student = 12 * 7 + 7 * 7
    for sequence_parallel, centred, live in [
        (False, False, True),
        (False, True, True),
        (False, False, False),
        (True, False, True),
        (True, False, False),
    ]:
        layers = make_layers(4 if sequence_parallel else 5, 30, padded=32, dtype=torch.float32)
        case = layers.earlier
        part = RankPart.of(case, sequence_parallel=sequence_parallel)
        heads = part.heads(case.student_head.detach()[part.rows].requires_grad_(live))
        with expect([("allreduce", 4 * size) for size in (7 + 12 + 1, student + 12 * 12)]):
            grams = head_grams(heads)
        with expect([("allreduce", 4 * size) for size in (7, student)]):
            head_grams(heads, previous=grams)
        shared = not sequence_parallel
        with expect([("allgather_base", 4 * 3)] * shared):
            cosine = layers.cosine(grams, part.tokens, centred=centred)
        wanted = [("allgather_base", 4 * 3 * (7 if centred else 8))] * shared
        with expect(wanted + [("allreduce", 4 * (student + 7))] * live):
            cosine.sum().backward()
