"""The worked example of a term from outside, and its oracle: plain float64, on one process."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_fdd.losses.term_modules import make_modules
from megatron_fdd.losses.terms import TERMS
from tests.oracle import reference
from tests.oracle.case import Case, Result, case_batches, fdd_config, widths
from tests.oracle.reference import Shape, Weights

EXAMPLE = "examples.extend.term"


@contextmanager
def own_table() -> Iterator[None]:
    """Restore the table of terms after the example has added to it."""
    before = [*TERMS]
    try:
        yield
    finally:
        TERMS[:] = before
        sys.modules.pop(EXAMPLE, None)


@contextmanager
def known() -> Iterator[None]:
    """Make `fixed_mse` and `learned_mse` known to the package, in the way of the example."""
    with own_table():
        importlib.import_module(EXAMPLE)
        assert [term.kind for term in TERMS[-2:]] == ["fixed_mse", "learned_mse"]
        yield


def expected_with_terms(case: Case) -> Result:
    """Return the result of `expected` plus the example's terms. Only their first projections are the package's."""
    student = reference.double(reference.random_weights(case.student, 1), requires_grad=True)
    teacher = reference.double(reference.random_weights(case.teacher, 2), requires_grad=False)
    batch = reference.stacked(case_batches(case))
    total, means = reference.distillation_loss(
        case.terms, (case.student, case.teacher), (student, teacher), batch
    )
    projections = first_projections(case)
    for kind, weight in case.own_terms:
        values = term_means(case, (student, teacher), batch, projections, kind)
        names = [f"{kind} s{s}:t{t}" for s, t in case.terms.pairs]
        means |= {name: value.item() for name, value in zip(names, values, strict=True)}
        total = total + weight * torch.stack(values).mean()
    means["total"] = total.item()
    total.backward()
    learned = {
        f"fdd_terms.{kind}.{index}.weight": p for (kind, index), p in projections.items() if p.requires_grad
    }
    gradients = {name: w.grad for name, w in (student | learned).items()}
    return Result(
        means, {name: torch.zeros_like(student[name]) if g is None else g for name, g in gradients.items()}
    )


def first_projections(case: Case) -> dict[tuple[str, int], Tensor]:
    """Return the projection [teacher's width, student's width] of each term and tap; learned ones require gradients."""
    with known():
        made = make_modules(fdd_config(case), range(len(case.terms.pairs)), widths(case))
    weights = {key: module.weight.detach().double() for key, module in made.items()}
    return {key: weight.requires_grad_(key[0].startswith("learned")) for key, weight in weights.items()}


def term_means(
    case: Case,
    models: tuple[Weights, Weights],
    batch: dict[str, Tensor],
    projections: dict[tuple[str, int], Tensor],
    kind: str,
) -> list[Tensor]:
    """Return the token mean of each pair."""
    mask = batch["token_mask" if case.terms.all_tokens else "loss_mask"].double()
    student_blocks = reference.forward(case.student, models[0], batch)[1]
    teacher_blocks = reference.forward(case.teacher, models[1], batch)[1]
    means = []
    for index, (s, t) in enumerate(case.terms.pairs):
        wanted = normed(case.teacher, models[1], teacher_blocks[t - 1])
        found = normed(case.student, models[0], student_blocks[s - 1])
        if (kind, index) in projections:
            found = F.linear(found, projections[kind, index])
        value = ((found - wanted) ** 2).sum(-1) / (wanted**2).sum(-1)
        means.append(value[mask > 0].sum() / mask.sum())
    return means


def normed(shape: Shape, weights: Weights, x: Tensor) -> Tensor:
    return reference.rms_norm(x, weights["decoder.final_layernorm.weight"].detach(), shape.epsilon)
