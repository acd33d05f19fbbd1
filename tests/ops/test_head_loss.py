"""head_loss on one rank and on several: sums, gradients, products and memory, compared with a float64 reference."""

from __future__ import annotations

import itertools
from dataclasses import replace
from unittest.mock import Mock, patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.measure import MIB, peak_of
from megatron_fdd.ops import implementation as choices
from megatron_fdd.ops.head_loss import HeadLoss, LossWeights, head_loss
from megatron_fdd.ops.implementation import smallest_gpu_bytes
from megatron_fdd.ops.linear_kl import DEFAULT_IMPLEMENTATION, Divergence, Implementation, linear_kl
from tests.harness.ranks import distributed
from tests.ops.head_loss_case import FACTOR, reference, scaled, weights_of
from tests.ops.linear_kl_case import (
    KINDS,
    Case,
    LargestTensor,
    Products,
    RankPart,
    error,
    gradients,
    make_case,
    parameter_of_ddp,
)

FEW = Implementation("torch", held_logits=53 * 5)  # 5 tokens of a vocabulary of 53 at a time
FORWARD_KL = Divergence()
PATHS = (FEW, Implementation("torch"), Implementation("reference"))


def run(
    case: Case,
    hidden: Tensor,
    head: Tensor,
    weights: LossWeights,
    divergence: Divergence | None = FORWARD_KL,
    implementation: Implementation = DEFAULT_IMPLEMENTATION,
) -> HeadLoss:
    """Run the operation on one rank, with labels."""
    heads = case.heads(head, implementation)
    return head_loss(
        case.teacher, hidden, heads, divergence=divergence, labels_N=case.labels, weights=weights
    )


def run_streamed(case: Case, implementation: Implementation) -> None:
    heads = case.heads(case.student_head.detach(), implementation)
    result = linear_kl(case.teacher, case.student, heads, divergence=FORWARD_KL)
    assert result.divergence_N is not None
    result.divergence_N.sum().backward()


def assert_matches(
    case: Case, divergence: Divergence | None, implementation: Implementation, *, trained: bool
) -> None:
    weights = weights_of(case)
    hidden, head = case.student.clone().requires_grad_(), case.student_head.clone().requires_grad_(trained)
    ours = run(case, hidden, head, weights, divergence, implementation)
    leaves = [x.double().clone().requires_grad_() for x in (case.student, case.student_head)]
    expected = reference(case, divergence, weights, *leaves)
    for value, wanted in zip(ours, expected, strict=True):
        assert (value is None) == (wanted is None)
        assert value is None or error(value, wanted) < 1e-6
    inputs = (hidden, head) if trained else (hidden,)
    wanted = gradients(scaled(expected), *leaves)
    for gradient, of_reference in zip(gradients(scaled(ours), *inputs), wanted, strict=False):
        assert error(gradient, of_reference) < 1e-5


@pytest.mark.parametrize("trained", [False, True], ids=["constant-head", "trained-head"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", [*KINDS, None])
def test_sums_and_gradients(kind: str | None, temperature: float, trained: bool) -> None:
    case = make_case(13, 53, padded=61).to(torch.float32)
    divergence = None if kind is None else Divergence(kind, temperature=temperature)
    for implementation in PATHS:
        assert_matches(case, divergence, implementation, trained=trained)


@pytest.mark.parametrize("implementation", PATHS)
def test_only_the_loss_carries_gradient(implementation: Implementation) -> None:
    """The two sums cannot be differentiated, in whatever order somebody weights them."""
    case = make_case(13, 53).to(torch.float32)
    leaves = (case.student.requires_grad_(), case.student_head.requires_grad_())
    result = run(case, *leaves, weights_of(case), implementation=implementation)
    assert result.loss.requires_grad
    assert result.divergence is not None
    assert result.cross_entropy is not None
    with pytest.raises(RuntimeError, match="does not require grad"):
        (result.divergence + result.cross_entropy).backward()


@pytest.mark.parametrize("summed_in", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [None, torch.tensor(FACTOR)], ids=["late", "at-once"])
def test_into_main_grad_over_micro_batches(factor: Tensor | None, summed_in: torch.dtype) -> None:
    case = make_case(13, 53, padded=61).to(torch.float32)
    weights, head = replace(weights_of(case), factor=factor), parameter_of_ddp(case.student_head)
    head.main_grad = head.main_grad.to(summed_in)
    hidden = case.student.clone().requires_grad_()
    leaves = [x.double().clone().requires_grad_() for x in (case.student, case.student_head)]
    expected = gradients(scaled(reference(case, Divergence(), weights, *leaves)), *leaves)
    tolerance = 1e-6 if summed_in == torch.float32 else 2e-2
    for micro_batch in range(1, 3):
        result = run(case, hidden, head, weights, implementation=FEW)
        in_forward = factor is not None and summed_in == torch.float32
        before = micro_batch - (not in_forward)
        assert error(head.main_grad.double() - 3.0, before * expected[1]) < tolerance or before == 0
        scaled(result).backward()
        assert head.grad is not None
        assert head.grad_added_to_main_grad
        head.grad = None
        assert error(head.main_grad.double() - 3.0, micro_batch * expected[1]) < tolerance
        assert error(hidden.grad, micro_batch * expected[0]) < 1e-6


def test_a_factor_that_is_not_the_losss_is_an_error() -> None:
    case = make_case(13, 53).to(torch.float32)
    weights = replace(weights_of(case), factor=torch.tensor(FACTOR + 1))
    result = run(case, case.student, parameter_of_ddp(case.student_head), weights)
    with pytest.raises(RuntimeError, match="another gradient than LossWeights.factor"):
        scaled(result).backward()


def test_a_gradient_that_is_not_a_number_is_passed_on() -> None:
    """The check of gradients stops the step; an assertion on a GPU would end the process."""
    case = make_case(13, 53).to(torch.float32)
    weights = replace(weights_of(case), factor=torch.tensor(FACTOR))
    hidden, head = case.student.requires_grad_(), parameter_of_ddp(case.student_head)
    result = run(case, hidden, head, weights)
    (scaled(result) * float("nan")).backward()
    assert hidden.grad.isnan().all()


def test_nothing_is_kept_of_a_head_whose_gradient_is_added_at_once() -> None:
    case = make_case(64, 1000).to(torch.float32)
    head = parameter_of_ddp(case.student_head)

    def peak(factor: Tensor | None) -> float:
        weights = replace(weights_of(case), factor=factor)

        def call() -> None:
            scaled(run(case, case.student, head, weights)).backward()
            head.grad = None

        return peak_of(call) * MIB

    assert peak(None) - peak(torch.tensor(FACTOR)) > 0.9 * 4 * head.numel()


def test_without_a_gradient_no_logits_are_held() -> None:
    case = make_case(13, 53).to(torch.float32)
    weights = weights_of(case)
    with torch.no_grad():
        leaves = (case.student.requires_grad_(), case.student_head.requires_grad_())
        values = run(case, *leaves, weights, Divergence("jsd"))
    expected = reference(case, Divergence("jsd"), weights, case.student, case.student_head)
    assert not values.divergence.requires_grad
    assert error(values.divergence, expected.divergence.detach()) < 1e-6


@pytest.mark.parametrize("trained", [False, True], ids=["constant-head", "trained-head"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_product_beyond_the_least_possible(kind: str, trained: bool) -> None:
    """The products are two for logits, one for the hidden states and one for a trained head, with any divergence."""
    case = make_case(13, 53).to(torch.float32)
    weights = weights_of(case)
    student = (case.student.requires_grad_(), case.student_head.requires_grad_(trained))
    with Products() as products:
        result = run(case, *student, weights, Divergence(kind), FEW)
        scaled(result).backward()
    assert products.total == 13 * 53 * (12 + 7 * (2 + trained))


def assert_ranks_match(num_tokens: int, vocab_size: int, padded: int, *, sequence_parallel: bool) -> None:
    case = make_case(num_tokens, vocab_size, padded=padded)
    part = RankPart.of(case, sequence_parallel=sequence_parallel)
    whole, rows = weights_of(case), part.tokens
    weights = LossWeights(whole.divergence_N[rows], whole.entropy_N[rows], whole.divergence, whole.entropy)
    # Ranks with fewer valid rows must cut the tokens in the same way as the others.
    few = Implementation("torch", held_logits=2 * len(case.student_head) // dist.get_world_size())
    for kind, implementation in itertools.product(
        (*KINDS, None), (few, Implementation("torch"), Implementation("reference"))
    ):
        divergence = None if kind is None else Divergence(kind, temperature=2.0)
        leaves = [x.clone().requires_grad_() for x in (case.student, case.student_head)]
        expected = reference(case, divergence, whole, *leaves)
        wanted = gradients(scaled(expected), *leaves)
        hidden, head = part.inputs(live=True)
        ours = head_loss(
            case.teacher[rows],
            hidden,
            part.heads(head, implementation),
            divergence=divergence,
            labels_N=case.labels[rows],
            weights=weights,
        )
        for value, reference_value in zip(ours, expected, strict=True):
            if value is not None:
                total = value.detach().clone()
                if sequence_parallel:
                    dist.all_reduce(total)
                assert error(total, reference_value) < 1e-12, (kind, implementation)
        found = gradients(scaled(ours), hidden, head)
        assert error(found[0], wanted[0][rows]) < 1e-12, (kind, implementation)
        assert error(found[1], wanted[1][part.rows]) < 1e-12, (kind, implementation)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@distributed(ranks=2)
def test_two_ranks(sequence_parallel: bool) -> None:
    assert_ranks_match(10, 31, 32, sequence_parallel=sequence_parallel)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@distributed(ranks=4)
def test_four_ranks_one_of_them_all_padding(sequence_parallel: bool) -> None:
    assert_ranks_match(8, 10, 16, sequence_parallel=sequence_parallel)


def assert_one_block_is_held(part: RankPart) -> None:
    """Compare the peak with what one block needs: both models' logits, and temporaries of an eighth."""
    case, rows = part.case, 100
    weights = LossWeights(case.upstream[0][part.tokens], case.upstream[2][part.tokens], 0.7, 0.3)
    student = part.inputs(live=True)
    held = rows * len(student[1])  # logits of a model

    def call() -> None:
        result = head_loss(
            case.teacher[part.tokens],
            student[0],
            part.heads(student[1], Implementation("torch", held_logits=held)),
            divergence=FORWARD_KL,
            labels_N=case.labels[part.tokens],
            weights=weights,
        )
        scaled(result).backward()

    others = held / 2 + 4 * sum(tensor.numel() for tensor in student) + 40 * len(case.student)
    assert 4 * 2 * held < peak_of(call) * MIB < 4 * (2 * held + others)


def test_one_block_of_logits_is_held_at_a_time() -> None:
    case = make_case(1000, 1024).to(torch.float32)
    assert_one_block_is_held(RankPart(case, case.heads().shard, slice(None), slice(None)))


@pytest.mark.parametrize("held_logits", [None, 153 * 5, 153 * 50])
def test_most_logits_is_the_size_of_the_largest_buffer(held_logits: int | None) -> None:
    case = make_case(400, 153).to(torch.float32)
    leaves = (case.student.requires_grad_(), case.student_head.requires_grad_())
    implementation = Implementation("torch", tile_size=40, block_rows=100, held_logits=held_logits)
    with LargestTensor() as largest:
        scaled(run(case, *leaves, weights_of(case), implementation=implementation)).backward()
        run_streamed(case, implementation)
    assert largest.numel == 2 * implementation.most_logits(400, 153, gpu_bytes=None)


@pytest.mark.parametrize(("gibibytes", "tokens"), [(79.1, 2048), (139.8, 2048), (44.5, 1024)])
def test_a_gpu_holds_logits_by_its_memory(gibibytes: float, tokens: int) -> None:
    memory = int(gibibytes * 2**30)
    assert Implementation().most_logits(10**5, 2**17, gpu_bytes=memory) == tokens * 2**17
    gpu = torch.device("cuda")
    with patch.object(torch.cuda, "get_device_properties", return_value=Mock(total_memory=memory)):
        assert Implementation().held_rows(Mock(spec=Tensor, device=gpu, __len__=lambda _: 2**17)) == tokens


@distributed(ranks=2)
def test_the_smallest_gpu_of_a_group_decides_for_all() -> None:
    rank, cpu, group = dist.get_rank(), torch.device("cpu"), dist.group.WORLD
    assert smallest_gpu_bytes(cpu, group) is None
    with patch.object(choices, "memory_of_gpu", lambda _device: (140, 44)[rank] * 2**30):
        assert smallest_gpu_bytes(cpu, group) == 44 * 2**30
        assert smallest_gpu_bytes(cpu, None) == (140, 44)[rank] * 2**30
        head = torch.empty(2**17, 0)
        assert Implementation().held_rows(head) == (2048, 1024)[rank]
        assert Implementation().held_rows(head, gpu_bytes=44 * 2**30) == 1024


@pytest.mark.parametrize("sequence_parallel", [False, True])
@distributed(ranks=2)
def test_one_block_of_logits_is_held_at_a_time_on_each_rank(sequence_parallel: bool) -> None:
    case = make_case(1000, 2048).to(torch.float32)
    assert_one_block_is_held(RankPart.of(case, sequence_parallel=sequence_parallel))
