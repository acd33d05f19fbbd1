"""Properties of the terms that hold for any numbers, and tests that the central test can fail."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from megatron_fdd.data.batch import Batch
from megatron_fdd.losses import carry, objective
from megatron_fdd.losses.chunk_loss import ChunkLoss
from megatron_fdd.losses.features import TeacherFeatures
from megatron_fdd.losses.lens import Lens
from megatron_fdd.losses.pairs import LayerPair
from megatron_fdd.losses.tap import TokenWeights
from megatron_fdd.ops import head_loss
from megatron_fdd.ops.exact_cast import to_rows
from megatron_fdd.ops.head_loss import LossWeights
from megatron_fdd.ops.linear_kl import VocabShard
from megatron_fdd.ops.request import Request
from megatron_fdd.ops.vocab_shard import Pending
from megatron_fdd.step import connect, student
from megatron_fdd.step.injection import attach_loss
from megatron_fdd.step.lens_copies import LensCopies
from megatron_fdd.step.student import ChunkForward
from megatron_fdd.step.teacher.beside import BesideTeacher
from tests.harness.ranks import run_on_ranks
from tests.oracle import case as layouts
from tests.oracle import reference
from tests.oracle.case import (
    Case,
    Result,
    assert_equal,
    expected,
    relative,
    run_step,
    small,
)
from tests.oracle.reference import STUDENT, Terms

pytestmark = pytest.mark.tier("default")

# Each case has only one term, at one inner layer (two for the delta); block 4 is the deepest tap.
ONE_TERM = {
    "trajectory": Terms(pairs=((2, 3), (4, 7)), beta=0.0, kd=0.0),
    "delta": Terms(pairs=((2, 3), (4, 7)), alpha=0.0, kd=0.0),
    "centred delta": Terms(pairs=((2, 3), (4, 7)), alpha=0.0, kd=0.0, centred=True),
}


@pytest.mark.parametrize("name", ONE_TERM)
def test_gradient_is_non_zero_below_the_tap_and_zero_above(name: str) -> None:
    case = Case(tp=2, terms=ONE_TERM[name])
    for result in run_on_ranks(run_step, case.layout, {"case": case}):
        for parameter, gradient in result.gradients.items():
            layer = int(parameter.split(".")[2]) if parameter.startswith("decoder.layers.") else None
            below = layer < 4 if layer is not None else parameter.startswith("embedding.")
            assert bool(gradient.any()) == below, f"{name}: {parameter}"


@pytest.mark.parametrize("terms", [Terms(), Terms(centred=True), Terms(kd_kind="jsd", trajectory_kind="rkl")])
@pytest.mark.parametrize(("tp", "sequence_parallel"), [(1, False), (2, True)])
def test_a_student_that_is_the_teacher_has_no_loss(terms: Terms, tp: int, sequence_parallel: bool) -> None:
    terms = replace(terms, pairs=((1, 1), (3, 3), (6, 6)))
    case = Case(tp=tp, sequence_parallel=sequence_parallel, terms=terms, teacher=STUDENT)
    unequal = run_on_ranks(run_step, case.layout, {"case": case})
    with_itself = run_on_ranks(run_own_teacher, case.layout, {"case": case})
    for result, other in zip(with_itself, unequal, strict=True):
        for name, value in result.means.items():
            if name.split()[0] in ("kd", "trajectory", "delta"):
                assert abs(value) <= 1e-6, name
        for name, gradient in result.gradients.items():
            assert gradient.norm() <= 1e-5 * other.gradients[name].norm(), name


def run_own_teacher(case: Case) -> Result:
    """Run a step as `run_step` does, with the student's weights in the teacher."""
    weights = reference.random_weights(case.student, 1)
    with patch.object(reference, "random_weights", lambda _shape, _seed: weights):
        return run_step(case)


@pytest.mark.parametrize(("tp", "sequence_parallel"), [(1, False), (2, False), (2, True)])
def test_bf16_is_as_close_to_float64_as_plain_bf16_torch(tp: int, sequence_parallel: bool) -> None:
    case = Case(tp=tp, sequence_parallel=sequence_parallel, bf16=True, terms=Terms(ce=0.5))
    wanted, plain = rounded_reference(case, torch.float64), rounded_reference(case, torch.bfloat16)
    for result in run_on_ranks(run_step, case.layout, {"case": case}):
        # A single number can be right by luck; all terms together cannot.
        assert means_error(result, wanted) <= 2 * means_error(plain, wanted)
        for name, gradient in wanted.gradients.items():
            error = relative(result.gradients[name] - gradient, gradient)
            assert error <= 2 * relative(plain.gradients[name] - gradient, gradient), name


def means_error(result: Result, wanted: Result) -> float:
    """Return the relative distance of all terms."""
    values = [(result.means[name] - value) / value for name, value in wanted.means.items()]
    return sum(value**2 for value in values) ** 0.5


def rounded_reference(case: Case, dtype: torch.dtype) -> Result:
    """Compute the reference with bf16 weights in `dtype`."""

    def cast(weights: reference.Weights, *, requires_grad: bool) -> reference.Weights:
        rounded = {name: value.bfloat16().to(dtype) for name, value in weights.items()}
        return {name: value.requires_grad_(requires_grad) for name, value in rounded.items()}

    with patch.object(reference, "double", cast):
        result = expected(case)
    return Result(result.means, {name: value.double() for name, value in result.gradients.items()})


def stack_nothing(self: VocabShard, tensor: Tensor) -> Pending:
    return Pending(tensor.expand(self.num_ranks, *tensor.shape))


def reduce_nothing(self: VocabShard, tensor: Tensor) -> Pending:
    return Pending(self.own_tokens(tensor))


def also_for_autograd(head_WD: Tensor) -> Tensor:
    return head_WD.main_grad.to(head_WD.dtype)


def join_nothing(self: VocabShard, share: Tensor, num_tokens: int) -> Tensor:
    return share.new_zeros(num_tokens, *share.shape[1:]).index_add_(
        0, torch.arange(num_tokens)[: len(share)] + self.rank * len(share), share
    )


def batch_major_rows(self: ChunkForward, value_BS: Tensor) -> Tensor:
    return value_BS.flatten()


def count_padding(padded: int, _vocab: int, topology: layouts.Topology) -> VocabShard:
    rows = padded // topology.tensor_size
    return VocabShard(topology.tensor_rank * rows, rows, topology.tensor_group, topology.sequence_parallel)


def attach_twice(output: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
    return attach_loss(attach_loss(output, loss, scale), loss, scale)


def rounded_rows(value_M: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    return to_rows(value_M.bfloat16().float(), width, dtype)


def ignore_mask(self: ChunkForward, batch: Batch) -> TokenWeights:
    weights = real_token_weights(self, batch)
    if self.objective.chunk.is_last:
        return weights
    return TokenWeights(torch.ones_like(weights.label_N), torch.ones_like(weights.term_N))


def send_other_head(self: LensCopies, lens: Lens | None, empty: Any) -> Lens | None:
    copy = real_refresh(self, lens, empty)
    return copy if copy is None or lens is not None else replace(copy, head_WH=copy.head_WH * 1.01)


def keep_the_last_sums(self: ChunkForward, loss: ChunkLoss, weights: TokenWeights) -> None:
    self._sums = None
    real_add_sums(self, loss, weights)


def features_of_the_first(self: BesideTeacher, _index: int, batch: Batch) -> TeacherFeatures:
    if id(self) not in FIRST_BATCHES:
        FIRST_BATCHES.clear()
        FIRST_BATCHES[id(self)] = batch
    return real_features(self, 0, FIRST_BATCHES[id(self)])


def swapped_weights(*tokens: Tensor, divergence: float, entropy: float, **rest: Any) -> LossWeights:
    return LossWeights(*tokens, divergence=entropy, entropy=divergence, **rest)


def swapped_gradients(request: Request, weights: LossWeights, dtype: torch.dtype) -> Tensor:
    swapped = replace(weights, divergence=weights.entropy, entropy=weights.divergence)
    return real_stack_weights(request, swapped, dtype)


FIRST_BATCHES: dict[int, Batch] = {}
real_token_weights, real_refresh = ChunkForward.token_weights, LensCopies.refresh
real_stack_weights = head_loss._stack_weights
real_add_sums, real_features = ChunkForward._add_sums, BesideTeacher.features

# The changes that break the package, by the name of the broken part.
MUTATIONS = {
    "statistics are not gathered": (VocabShard, "start_stack", stack_nothing),
    "hidden gradient is not reduced": (VocabShard, "start_reduce", reduce_nothing),
    "shares of tokens are not joined": (VocabShard, "join_shares", join_nothing),
    "layer off by one": (LayerPair, "student_layer", property(lambda pair: pair.student_block)),
    "teacher layer off by one": (LayerPair, "teacher_layer", property(lambda pair: pair.teacher_block)),
    "mask in the wrong order": (ChunkForward, "rows", batch_major_rows),
    "head gradient is autograd's too": (head_loss, "dummy", also_for_autograd),
    "padded rows counted": (connect, "vocab_shard", count_padding),
    "weights of ce and kd are swapped": (objective, "LossWeights", swapped_weights),
    "their gradients' weights are swapped": (head_loss, "_stack_weights", swapped_gradients),
    "only the last micro-batch is summed": (ChunkForward, "_add_sums", keep_the_last_sums),
    "the teacher sees the first micro-batch alone": (BesideTeacher, "features", features_of_the_first),
}


PIPELINE_MUTATIONS = {
    "the loss is attached twice": (student, "attach_loss", attach_twice),
    "the carried lse is bf16": (carry, "to_rows", rounded_rows),
    "the mask is on the last stage only": (ChunkForward, "token_weights", ignore_mask),
    "the copy of the head is another": (LensCopies, "refresh", send_other_head),
}


def run_broken(case: Case, mutation: str) -> Result:
    """Run a step as `run_step` does, with one piece of the package broken on purpose."""
    owner, name, replacement = (MUTATIONS | PIPELINE_MUTATIONS)[mutation]
    with patch.object(owner, name, replacement):
        return run_step(case)


@pytest.mark.parametrize("mutation", [*MUTATIONS, *PIPELINE_MUTATIONS])
def test_the_central_test_catches(mutation: str) -> None:
    case = small(Case(pp=2) if mutation in PIPELINE_MUTATIONS else Case(tp=2))
    assert case.student.vocab % 8, "there must be padding"
    with pytest.raises(
        (AssertionError, pytest.fail.Exception),
        match="AssertionError|gradient off|comparison failed|cross-entropy on the first batch is nan",
    ):
        check_broken(case, mutation)


def check_broken(case: Case, mutation: str) -> None:
    """Make the central test's check. The ranks themselves may notice the mistake before."""
    for result in run_on_ranks(run_broken, case.layout, {"case": case, "mutation": mutation}):
        assert_equal(result, expected(case))


def test_nothing_is_broken_without_a_mutation() -> None:
    for case in (small(Case(tp=2)), small(Case(pp=2))):
        for result in run_on_ranks(run_step, case.layout, {"case": case}):
            assert_equal(result, expected(case))
