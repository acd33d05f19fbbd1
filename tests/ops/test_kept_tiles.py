"""Tiles that the gradient of held logits leaves out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from megatron_fdd.ops.implementation import Implementation
from megatron_fdd.ops.linear_kl import Divergence
from tests.ops.inner_case import Inner, gradients_of, leaves_of, make_layers
from tests.ops.interpreted import DEVICE, few_columns
from tests.ops.linear_kl_case import KINDS, Products, error

pytest.importorskip("triton")
from megatron_fdd.ops.gpu import sweeps  # noqa: E402

pytestmark = pytest.mark.tier("all")
EXACT = Implementation("triton", held_logits=2 * 4 * 83)  # blocks of 4 tokens


@pytest.fixture(autouse=True)
def small_programs() -> Iterator[None]:
    with few_columns():
        yield


def concentrated() -> Inner:
    """Make layers in which half of the tokens give almost all probability to the first 16 columns."""
    layers = []
    for layer in make_layers(2, 8, 83):
        single = layer.to(torch.float32)
        for head, hidden in ((single.teacher_head, single.teacher), (single.student_head, single.student)):
            head[:, 0] = 0.0
            head[:16, 0] = 14.0
            hidden[:, 0] = torch.tensor([1.0, 0.0]).repeat(4)
        layers.append(single)
    return Inner(tuple(layers), divergences=(0.7, 0.7), deltas=(None, 0.4))


def run(inner: Inner, skip_below: float) -> tuple[Tensor, list[Tensor], int]:
    """Return the loss, the gradients of all layers, and the multiplications."""
    students = [leaf.detach().to(DEVICE).requires_grad_() for leaf in leaves_of(inner, torch.float32)]
    heads = inner.layers[0].heads(implementation=replace(EXACT, skip_below=skip_below))
    heads = replace(heads, teacher_WT=heads.teacher_WT.to(DEVICE), student_WD=heads.student_WD.to(DEVICE))
    with Products() as products:
        total, _ = inner.run(heads, students)
        found = gradients_of(total, students)
    return total, [each.cpu() for each in found], products.total


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["fkl", "rkl", None])
def test_what_is_left_out_costs_at_most_its_probabilities(kind: str | None, temperature: float) -> None:
    inner = concentrated()
    divergence = None if kind is None else Divergence(kind, temperature=temperature)
    inner = replace(inner, divergence=divergence)
    if divergence is None:
        inner = replace(inner, divergences=(None, None))
    exact_total, exact, all_products = run(inner, 0.0)
    total, found, products = run(inner, 1e-3)
    assert torch.equal(total, exact_total)
    # In two layers, of four tokens, nearly all columns but 16 times the student's width.
    assert products <= all_products - 2 * 4 * 56 * 7
    for ours, theirs in zip(found, exact, strict=True):
        assert not torch.equal(ours[::2], theirs[::2])
        assert error(ours, theirs.double()) < 1e-2


def test_nothing_is_left_out_where_all_probabilities_are_large_enough() -> None:
    inner = concentrated()
    _, exact, all_products = run(inner, 0.0)
    _, found, products = run(inner, 1e-30)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, exact, strict=True))
    assert products == all_products


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("fkl", "rkl")])
def test_other_divergences_leave_nothing_out(kind: str) -> None:
    inner = replace(concentrated(), divergence=Divergence(kind))
    assert all(
        torch.equal(ours, theirs)
        for ours, theirs in zip(run(inner, 1e-3)[1], run(inner, 0.0)[1], strict=True)
    )


def test_the_host_waits_once_a_block() -> None:
    """However many tiles there are: the counts of kept tokens of all of them are read together."""
    inner = concentrated()
    with patch.object(sweeps, "add_kept_product", side_effect=sweeps.add_kept_product) as products:
        run(inner, 1e-3)
    assert products.call_count == 2 * 2  # layers and blocks
