"""Losses and gradients that are not finite: they end the run on every rank, before an update or a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.training import get_args
from torch import Tensor

from megatron_fdd.step import student
from tests.entry.command import Ending, Patch, read_metrics, run
from tests.entry.conftest import Toys

SAVED = "latest_checkpointed_iteration.txt"


def assert_stopped(endings: list[Ending], folder: Path, message: str) -> None:
    """Assert that the run stopped in iteration 2 and wrote nothing of it."""
    assert [ending.status for ending in endings] == [1, 1]
    for rank, ending in enumerate(endings):
        (line,) = [line for line in ending.err.splitlines() if "megatron_fdd: error: " in line]
        assert line.startswith("rank 1: " if rank else "megatron_fdd: ")
        assert message in line
        assert "--lr" in line
    assert (folder / SAVED).read_text() == "1"
    assert not (folder / "iter_0000002").exists()
    assert [record["iteration"] for record in read_metrics(folder / "metrics.jsonl")] == [1]


def command(toy: Toys, folder: Path, *more: str) -> list[str]:
    places = ["--save", folder, "--save-interval", "1", "--fdd-metrics-file", folder / "metrics.jsonl"]
    return toy.command(*places, *more)


def test_weights_that_exploded(toy: Toys, tmp_path: Path) -> None:
    [endings] = run(command(toy, tmp_path, *"--lr 1e30 --lr-warmup-iters 0".split()))
    assert_stopped(endings, tmp_path, "error: iteration 2: total, ")


class BadGradient(torch.autograd.Function):
    """An identity whose gradient is not a number."""

    @staticmethod
    def forward(_context: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(_context: Any, gradient: Tensor) -> Tensor:
        return gradient * float("nan")


real_report = student._loss_function


def bad_report(loss: Tensor, **keywords: Any) -> Any:
    """Compute the student's loss; in iteration 2 the loss is good and its gradient is not."""
    if get_args().curr_iteration == 1:
        loss = BadGradient.apply(loss)
    return real_report(loss, **keywords)


def test_gradient_that_exploded(toy: Toys, tmp_path: Path) -> None:
    [endings] = run(
        command(toy, tmp_path), patches=[Patch("megatron_fdd.step.student", "_loss_function", bad_report)]
    )
    assert_stopped(endings, tmp_path, "error: iteration 2: the norm of the gradient is nan")


real_take_sums = student.StudentForward.take_sums


def nan_on_last_rank(step: student.StudentForward) -> Tensor:
    """Return the step's sums; in iteration 2 one rank's numbers are bad."""
    sums = real_take_sums(step)
    if get_args().curr_iteration == 1 and get_args().rank == get_args().world_size - 1:
        sums[3:] = float("nan")
    return sums


def test_loss_of_one_rank_stops_all(toy: Toys, tmp_path: Path) -> None:
    [endings] = run(
        command(toy, tmp_path),
        patches=[Patch("megatron_fdd.step.student.StudentForward", "take_sums", nan_on_last_rank)],
    )
    assert_stopped(endings, tmp_path, "error: iteration 2: total, ")


def test_the_check_can_be_switched_off(toy: Toys, tmp_path: Path) -> None:
    flags = "--lr 1e30 --lr-warmup-iters 0 --no-check-for-nan-in-loss-and-grad".split()
    [endings] = run(command(toy, tmp_path, *flags))
    assert [ending.status for ending in endings] == [0, 0]
    assert [record["total"] for record in read_metrics(tmp_path / "metrics.jsonl")][1:] == [None, None]
