"""Whole optimizer steps: the loss after three is the same at every layout, and copies of heads stay fresh."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.utils import unwrap_model

from megatron_fdd.losses.lens import Lens
from megatron_fdd.step.lens_copies import LensCopies
from megatron_fdd.step.teacher.arguments import even_layout
from megatron_fdd.step.trained_lens import TrainedLens
from tests.harness.ranks import run_on_ranks
from tests.oracle import models, reference
from tests.oracle.case import (
    FULL_UNIFORM,
    LENGTH,
    MICRO_BATCH,
    MICRO_BATCHES,
    STUDENT_EXPERTS,
    TEACHER_EXPERTS,
    Case,
    Result,
    assert_equal,
    expected,
    join,
    run_step,
    schedule_step,
    small,
)
from tests.oracle.reference import STUDENT, TEACHER, Terms

pytestmark = pytest.mark.tier("default")

STEPS = 3


def train(case: Case, distributed: bool = False) -> tuple[list[float], bool]:
    """Return, on every rank, the last stage's totals before, between and after three optimizer steps, and
    whether both embeddings are equal at the end.

    Args:
        distributed: whether to use the distributed optimizer.
    """
    ddp = {"overlap_grad_reduce": case.dp > 1, "use_distributed_optimizer": distributed}
    chunks, _, steps = join(case, ddp)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-3, clip_grad=0.0, use_distributed_optimizer=distributed),
        chunks,
    )
    totals = []
    for step in range(STEPS + 1):
        optimizer.zero_grad()
        means = schedule_step(case, chunks, steps)
        totals += [float(each["total"]) for each in means]
        if step < STEPS:
            optimizer.step()
    embedding = unwrap_model(chunks)[0].shared_embedding_or_output_weight()
    return totals, case.student.tied and _ends_are_equal(embedding)


def _ends_are_equal(embedding: torch.Tensor | None) -> bool:
    group = parallel_state.get_pipeline_model_parallel_group()
    ends: list[torch.Tensor | None] = [None] * group.size()
    dist.all_gather_object(ends, None if embedding is None else embedding.detach(), group=group)
    return torch.equal(ends[0], ends[-1])


@pytest.mark.parametrize("live", [False, True])
def test_both_copies_of_a_tied_embedding_stay_bit_identical(live: bool) -> None:
    case = Case(student=replace(STUDENT, tied=True), terms=Terms(live=live))
    ((wanted, _),) = run_on_ranks(train, case.layout, {"case": case})
    split = replace(case, pp=2, dp=2)
    results = run_on_ranks(train, split.layout, {"case": split})
    assert all(equal for _, equal in results)
    last_stage = [totals for totals, _ in results if totals]
    assert len(wanted) == STEPS + 1
    assert wanted[0] > wanted[-1]
    for totals in last_stage:
        assert totals == pytest.approx(wanted, rel=1e-5)


def forget_the_first_stage(self: TrainedLens, model: GPTModel, num_tokens: torch.Tensor) -> None:
    with patch.object(model, "share_embeddings_and_output_weights", False):
        real_send_home(self, model, num_tokens)


real_send_home = TrainedLens.send_home


def train_forgetting(case: Case) -> tuple[list[float], bool]:
    """Train as `train` does, but the first stage's copy never gets the gradient of the inner layers."""
    with patch.object(TrainedLens, "send_home", forget_the_first_stage):
        return train(case)


def test_a_forgotten_copy_would_be_noticed() -> None:
    case = Case(pp=2, student=replace(STUDENT, tied=True), terms=Terms(live=True))
    results = run_on_ranks(train_forgetting, case.layout, {"case": case})
    assert not any(equal for _, equal in results)


@functools.cache
def one_process(case: Case) -> list[float]:
    ((totals, _),) = run_on_ranks(train, case.layout, {"case": case})
    assert totals[0] > totals[-1]
    return totals


def alone(case: Case) -> Case:
    """Return the same models, terms and data on one rank."""
    names = ("terms", "student", "teacher", "packed", "micro_batches")
    return Case(**{name: getattr(case, name) for name in names})


def assert_same_totals(results: list[tuple[list[float], bool]], case: Case) -> None:
    """Assert that every rank of the last stage has the totals of one process."""
    wanted = one_process(alone(case))
    reported = [totals for totals, _ in results if totals]
    assert reported
    for totals in reported:
        assert totals == pytest.approx(wanted, rel=3e-6)


def shadow(terms: Terms) -> list[float]:
    """Train the float64 reference with torch's own AdamW and Megatron's default decay."""
    weights = reference.double(reference.random_weights(STUDENT, 1), requires_grad=True)
    teacher = reference.double(reference.random_weights(TEACHER, 2), requires_grad=False)
    optimizer = torch.optim.AdamW(list(weights.values()), lr=1e-3, weight_decay=0.01)
    batch = reference.stacked(reference.random_batches(MICRO_BATCHES, MICRO_BATCH, LENGTH, STUDENT.vocab))
    totals = []
    for _ in range(STEPS + 1):
        optimizer.zero_grad()
        total, _ = reference.distillation_loss(terms, (STUDENT, TEACHER), (weights, teacher), batch)
        total.backward()
        optimizer.step()
        totals.append(total.item())
    return totals


def test_three_steps_of_one_process_are_those_of_the_reference() -> None:
    assert one_process(Case()) == pytest.approx(shadow(Terms()), rel=1e-6)


# A layout, and whether the optimizer is distributed.
LAYOUTS = {
    "tp2-sp": (Case(tp=2, sequence_parallel=True), False),
    "dp2-distributed-optimizer": (Case(dp=2), True),
    "pp2": (Case(pp=2), False),
    "pp2-full-uniform": (Case(pp=2, recompute=FULL_UNIFORM), False),
    "pp2-live": (Case(pp=2, terms=Terms(live=True)), False),
    "pp2-vpp3": (Case(pp=2, vpp=3), False),
    "pp2-vpp2-uneven": (Case(pp=2, vpp=2), False),
    "pp2-dp2-distributed-optimizer": (Case(pp=2, dp=2), True),
    "tp2-pp2-sp": (Case(tp=2, pp=2, sequence_parallel=True), False),
    "pp4": (Case(pp=4, micro_batches=6), False),
    "pp4-vpp2": (
        Case(pp=4, vpp=2, micro_batches=8, student=replace(STUDENT, num_layers=8)),
        False,
    ),
    "cp2": (Case(cp=2), False),
    "tp2-cp2-sp": (Case(tp=2, cp=2, sequence_parallel=True), False),
    "pp2-cp2-distributed-optimizer": (Case(pp=2, cp=2), True),
    "packed-pp2": (Case(packed=True, pp=2), False),
    "ep2-student": (Case(dp=2, ep=2, student=STUDENT_EXPERTS), True),
    "ep2-teacher": (Case(dp=2, teacher_ep=2, teacher=TEACHER_EXPERTS), True),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_loss_after_three_steps_does_not_depend_on_the_layout(name: str) -> None:
    case, distributed = small(LAYOUTS[name][0]), LAYOUTS[name][1]
    results = run_on_ranks(train, case.layout, {"case": case, "distributed": distributed})
    assert_same_totals(results, case)


def train_uneven(case: Case) -> tuple[list[float], bool]:
    """Train as `train` does, with the student's layers split as no rule would."""
    with patch.object(models, "even_layout", uneven_layout):
        return train(case)


def uneven_layout(num_layers: int, num_stages: int) -> str:
    return "Et|tttt|tL" if (num_layers, num_stages) == (6, 3) else even_layout(num_layers, num_stages)


def test_three_steps_at_uneven_stages() -> None:
    case = Case(pp=3)
    assert_same_totals(run_on_ranks(train_uneven, case.layout, {"case": case}), case)


def train_with_stale_copies(case: Case) -> tuple[list[float], bool]:
    """Train as `train` does, but send copies of the head only in the first step."""
    refreshed: set[int] = set()

    def refresh_once(self: LensCopies, lens: Lens | None, empty: Callable[[], Lens]) -> Lens | None:
        if id(self) in refreshed:
            return self._copy if lens is None else lens
        refreshed.add(id(self))
        return real_refresh(self, lens, empty)

    with patch.object(LensCopies, "refresh", refresh_once):
        return train(case)


real_refresh = LensCopies.refresh


def test_a_stale_copy_of_the_head_would_be_noticed() -> None:
    case = Case(pp=2)
    results = run_on_ranks(train_with_stale_copies, case.layout, {"case": case})
    with pytest.raises(AssertionError):
        assert_same_totals(results, case)
    (stale,) = [totals for totals, _ in results if totals]
    # The first step has no older head; from the second on the totals are wrong.
    assert stale[0] == pytest.approx(one_process(alone(case))[0], rel=1e-5)
    assert stale[-1] != pytest.approx(one_process(alone(case))[-1], rel=1e-3)


def run_uneven(case: Case) -> Result:
    """Run a step as `run_step` does, with the student's layers split as no rule would."""
    with patch.object(models, "even_layout", uneven_layout):
        return run_step(case)


def test_gradients_at_uneven_stages() -> None:
    case = Case(pp=3, micro_batches=5)
    wanted = expected(case)
    for result in run_on_ranks(run_uneven, case.layout, {"case": case}):
        assert_equal(result, wanted)


def without_a_kept_head_gradient(case: Case) -> Result:
    """Run, on every rank, a step that may not hand over a head's gradient in its backward pass."""
    with patch("megatron_fdd.ops.head_loss.deliver", side_effect=AssertionError("kept until then")):
        return run_step(case)


@pytest.mark.parametrize("tied", [False, True])
def test_a_training_adds_the_heads_gradient_in_the_forward_pass(tied: bool) -> None:
    case = Case(student=replace(STUDENT, tied=tied), loss_scale=4.0)
    [result] = run_on_ranks(without_a_kept_head_gradient, case.layout, {"case": case})
    assert_equal(result, expected(case))
