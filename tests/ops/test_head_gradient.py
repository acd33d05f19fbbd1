"""A trained head's gradient, which goes to autograd or, as in Megatron's own fused layers, into `main_grad`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_fdd.ops.delta import head_grams
from megatron_fdd.ops.head_gradient import dummy
from megatron_fdd.ops.linear_kl import Divergence, Implementation, linear_kl
from tests.ops.linear_kl_case import Case, error, make_case, parameter_of_ddp, tiles


def loss(case: Case, head: Tensor, implementation: Implementation) -> Tensor:
    heads = case.heads(head, implementation)
    result = linear_kl(case.teacher, case.student, heads, divergence=Divergence(), labels_N=case.labels)
    grams = head_grams(heads)
    return result.divergence_N.sum() + result.cross_entropy_N.sum() + grams.student_student_DD.sum() / 100


@pytest.mark.parametrize("implementation", [tiles(16), tiles(16, block_rows=5), Implementation("reference")])
def test_all_contributions_are_added_to_main_grad(implementation: Implementation) -> None:
    case = make_case(13, 53, padded=61).to(torch.float32)
    plain = case.student_head.clone().requires_grad_()
    loss(case, plain, implementation).backward()
    head = parameter_of_ddp(case.student_head)
    for micro_batch in range(1, 3):
        loss(case, head, implementation).backward()
        assert head.grad_added_to_main_grad
        assert head.grad is not None, "DDP asserts that there is one"
        assert error(head.main_grad - 3.0, micro_batch * plain.grad.double()) < 1e-6
        head.grad = None


def test_the_dummy_of_a_weight_that_is_also_an_embedding_is_zero() -> None:
    """DDP's hook adds such a dummy, because the embedding's own gradient is in it."""
    case = make_case(13, 53).to(torch.float32)
    head = parameter_of_ddp(case.student_head)
    head.zero_out_wgrad = True
    loss(case, head, tiles(16)).backward()
    assert not head.grad.any()
    assert head.main_grad.ne(3.0).any()


def test_what_autograd_gets_is_allocated_once() -> None:
    """Micro-batches share it, and autograd does not copy it."""
    case = make_case(13, 53).to(torch.float32)
    head = parameter_of_ddp(case.student_head)
    places = set()
    for _ in range(2):
        heads = case.heads(head, tiles(16))
        result = linear_kl(case.teacher, case.student, heads, divergence=Divergence())
        result.divergence_N.sum().backward()
        places.add(head.grad.data_ptr())
        head.grad = None
    assert places == {dummy(head).data_ptr()}


def test_micro_batches_in_bf16_are_not_rounded_one_by_one() -> None:
    case = make_case(13, 53).to(torch.bfloat16)
    exact = case.to(torch.float64)
    head, wide = parameter_of_ddp(case.student_head), exact.student_head.clone().requires_grad_()
    head.main_grad.zero_()
    for _ in range(8):
        loss(case, head, tiles(16)).backward()
        loss(exact, wide, tiles(16)).backward()
    # The part from the Gram matrices still comes from a product that is rounded once.
    assert error(head.main_grad, wide.grad) < 4e-4  # autograd alone: 4e-3
