"""Datasets that a training script brings: other lengths on other ranks, and too few samples, are refused."""

from __future__ import annotations

from argparse import Namespace
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch.distributed as dist

from megatron_fdd.data.own_datasets import Lengths, check_lengths, with_checked_lengths
from tests.harness.ranks import Layout, run_on_ranks


@pytest.mark.parametrize(
    ("by_rank", "message"),
    [
        (
            ((80, 8, None), (80, 8, None), (79, 8, None)),
            "training set has 80 samples on rank 0 and 79 on rank 2",
        ),
        (((80, 8, None), (80, None, None)), "validation set has 8 samples on rank 0 and None on rank 1"),
        (((80, 8, 7),) * 2, "test set has 7 samples, and the run reads 8: give it as many"),
    ],
)
def test_lengths_that_a_run_cannot_use_are_refused(by_rank: tuple[Lengths, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_lengths(by_rank, (80, 8, 8))


def test_lengths_that_fit_pass() -> None:
    check_lengths([(80, 9, None)] * 2, (80, 8, 8))
    check_lengths([(3, 9, 0)] * 2, (None, None, None))


def provided(rank_lengths: list[int], loader: str) -> str:
    """Return, on each rank, what is said of a training set of another length on each rank."""

    def provider(_numbers: Lengths, vp_stage: int | None = None) -> list[object]:
        return [range(rank_lengths[dist.get_rank()]), iter(()), None]

    with patch("megatron_fdd.data.own_datasets.get_args", lambda: Namespace(dataloader_type=loader)):
        try:
            with_checked_lengths(provider)((4, 4, 4))
        except ValueError as error:
            return str(error)
        return ""


@pytest.mark.tier("default")
def test_every_rank_hears_the_same() -> None:
    def said(lengths: list[int], loader: str) -> list[str]:
        return list(run_on_ranks(provided, Layout(ranks=2), {"rank_lengths": lengths, "loader": loader}))

    first, second = said([5, 4], "cyclic")
    assert first == second
    assert "training set has 5 samples on rank 0 and 4 on rank 1" in first
    assert said([4, 4], "single") == said([3, 3], "cyclic") == ["", ""]
    assert all("has 3 samples, and the run reads 4" in each for each in said([3, 3], "single"))


def said_of(wrong: str) -> str:
    """Return, on each rank, what is said of a function that goes wrong on rank 1 alone."""

    def provider(_numbers: Lengths, vp_stage: int | None = None) -> object:
        if dist.get_rank() == 1:
            if wrong == "leaves":
                raise SystemExit(0)
            return [None, None] if wrong == "two" else [][0]
        return [None, None, None]

    with patch("megatron_fdd.data.own_datasets.get_args", lambda: Namespace(dataloader_type="cyclic")):
        try:
            with_checked_lengths(cast(Any, provider))((4, 4, 4))
        except ValueError as error:
            return str(error)
        return ""


@pytest.mark.tier("default")
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("leaves", "the script's `datasets` fails with SystemExit: 0; make it give three datasets"),
        (
            "fails",
            "the script's `datasets` fails with IndexError: list index out of range; make it give",
        ),
        (
            "two",
            "the script's `datasets` returns [None, None]: it must give the training, validation, test set",
        ),
    ],
)
def test_what_goes_wrong_on_one_rank_is_heard_on_every_one(wrong: str, message: str) -> None:
    first, second = run_on_ranks(said_of, Layout(ranks=2), {"wrong": wrong})
    assert first == second
    assert first.startswith(message)
