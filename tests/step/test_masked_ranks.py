"""Ranks, micro-batches and steps without a token, or without a label: no NaN, and all that counts stays right."""

from __future__ import annotations

import math
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from tests.harness.ranks import run_on_ranks
from tests.oracle import reference
from tests.oracle.case import (
    LENGTH,
    MICRO_BATCH,
    MICRO_BATCHES,
    Case,
    Result,
    assert_equal,
    expected,
    run_step,
    shard_vocab,
)
from tests.oracle.reference import Terms

pytestmark = pytest.mark.tier("default")

TERMS = Terms(ce=0.5)
ALL_TOKENS = replace(TERMS, all_tokens=True)
CASES = {
    "dp2": Case(dp=2, terms=TERMS),
    "pp2": Case(pp=2, terms=TERMS),
    "pp2-dp2": Case(pp=2, dp=2, terms=TERMS),
    "tp2-sp": Case(tp=2, sequence_parallel=True, terms=TERMS),
    "pp2-live": Case(pp=2, terms=replace(TERMS, live=True)),
    "pp2-all-tokens": Case(pp=2, terms=ALL_TOKENS),
    "dp2-all-tokens": Case(dp=2, terms=ALL_TOKENS),
    "dp2-all-tokens-drawn": Case(dp=2, terms=ALL_TOKENS, sample_tokens=0.95),  # room for all that count
}


def micro_batches_of_rank_1(masks: Tensor) -> None:
    """Mask the micro-batches of rank 1: data-parallel rank r has the micro-batches r, r + 2, ..."""
    masks[1::2] = 0


def one_micro_batch(masks: Tensor) -> None:
    masks[2] = 0


def second_half_of_the_sequence(masks: Tensor) -> None:
    """Mask the rows that tensor rank 1 holds under sequence parallelism."""
    masks[..., LENGTH // 2 :] = 0


def everything(masks: Tensor) -> None:
    masks.zero_()


MASKS = {
    each.__name__: each
    for each in (micro_batches_of_rank_1, one_micro_batch, second_half_of_the_sequence, everything)
}
# Labels may be missing where tokens are: the terms but the cross-entropy then have theirs (--fdd-tokens all).
LABELS_OF = "labels of "
real_batches = reference.random_batches


def masked_batches(name: str, *arguments: int) -> list[dict[str, Tensor]]:
    """Return the usual random batches, with some tokens that count nowhere, or have no label."""
    batches = real_batches(*arguments)
    for key in ("loss_mask",) if name.startswith(LABELS_OF) else ("loss_mask", "token_mask"):
        masks = torch.stack([batch[key] for batch in batches])
        MASKS[name.removeprefix(LABELS_OF)](masks)
        for batch, mask in zip(batches, masks, strict=True):
            batch[key] = mask
    return batches


def step_with(case: Case, name: str) -> Result:
    """Run a step on every rank; `expected` uses the same batches in this process."""
    with patch.object(reference, "random_batches", lambda *arguments: masked_batches(name, *arguments)):
        return run_step(case)


def wanted_with(case: Case, name: str) -> Result:
    with patch.object(reference, "random_batches", lambda *arguments: masked_batches(name, *arguments)):
        return expected(case)


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("dp2", "micro_batches_of_rank_1"),
        ("pp2-dp2", "micro_batches_of_rank_1"),
        ("tp2-sp", "second_half_of_the_sequence"),
        ("pp2", "one_micro_batch"),
        ("pp2-live", "one_micro_batch"),
        ("pp2-all-tokens", "one_micro_batch"),
        ("pp2-all-tokens", "labels of one_micro_batch"),
        ("pp2-all-tokens", "labels of everything"),
        ("dp2-all-tokens", "labels of micro_batches_of_rank_1"),
        ("dp2-all-tokens", "labels of everything"),
        ("dp2-all-tokens-drawn", "labels of everything"),
    ],
)
def test_masked_tokens_change_nothing_of_the_rest(name: str, mask: str) -> None:
    case = CASES[name]
    batches = masked_batches(mask, MICRO_BATCHES, MICRO_BATCH, LENGTH, shard_vocab(case))
    assert any(batch["token_mask"].any() for batch in batches)
    wanted = wanted_with(case, mask)
    for result in run_on_ranks(step_with, case.layout, {"case": case, "name": mask}):
        assert_equal(result, wanted)


@pytest.mark.parametrize("name", ["dp2", "tp2-sp", "pp2", "pp2-live", "pp2-all-tokens"])
def test_a_step_without_a_token_is_zero(name: str) -> None:
    case = CASES[name]
    results = run_on_ranks(step_with, case.layout, {"case": case, "name": "everything"})
    assert any(result.means for result in results)
    for result in results:
        assert all(value == 0 for value in result.means.values()), result.means
        for parameter, gradient in result.gradients.items():
            assert not gradient.any(), parameter
            assert math.isfinite(gradient.sum()), parameter
