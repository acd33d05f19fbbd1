"""Losses, gradients and weights that are not finite: they end the run on every rank, before a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.training import get_args
from torch import Tensor

from megatron_fdd.host.patches.adam import FusedAdam
from megatron_fdd.step import student
from tests.entry.command import Ending, Patch, read_metrics, run
from tests.entry.conftest import Toys

SAVED = "latest_checkpointed_iteration.txt"


def assert_stopped(endings: list[Ending], folder: Path, message: str, steps: int = 1) -> None:
    """Assert that the run stopped in iteration 2 and saved nothing of it; `steps`: so many are in the metrics."""
    assert [ending.status for ending in endings] == [1, 1]
    for rank, ending in enumerate(endings):
        (line,) = [line for line in ending.err.splitlines() if "megatron_fdd: error: " in line]
        assert line.startswith("rank 1: " if rank else "megatron_fdd: ")
        assert message in line
        assert "--lr" in line
    assert (folder / SAVED).read_text() == "1"
    assert not (folder / "iter_0000002").exists()
    assert [record["iteration"] for record in read_metrics(folder / "metrics.jsonl")] == [1, 2][:steps]


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


real_step = FusedAdam.step


def bad_update(optimizer: FusedAdam, _closure: None = None) -> None:
    """Update the weights; in iteration 2 one of them is no number afterwards, on one rank."""
    real_step(optimizer)
    args = get_args()
    if args.curr_iteration == 1 and args.rank == args.world_size - 1:
        next(param for group in optimizer.param_groups for param in group["params"]).data.view(-1)[0] = float(
            "nan"
        )


def test_an_update_that_no_loss_has_seen_is_not_saved(toy: Toys, tmp_path: Path) -> None:
    switched_off = "--no-check-for-nan-in-loss-and-grad"
    [endings] = run(
        command(toy, tmp_path, "--train-iters", "2", switched_off),
        patches=[Patch("megatron_fdd.host.patches.adam.FusedAdam", "step", bad_update)],
    )
    assert_stopped(
        endings, tmp_path, "error: iteration 2: the updated weights are not finite on 1 rank(s)", 2
    )
    assert "go on from the last checkpoint (of iteration 1)\n" in endings[0].err


def test_the_check_of_losses_can_be_switched_off(toy: Toys, tmp_path: Path) -> None:
    flags = "--lr 1e30 --lr-warmup-iters 0 --no-check-for-nan-in-loss-and-grad".split()
    [endings] = run(toy.command("--fdd-metrics-file", tmp_path / "metrics.jsonl", *flags))
    assert [ending.status for ending in endings] == [0, 0]
    assert [record["total"] for record in read_metrics(tmp_path / "metrics.jsonl")][1:] == [None, None]
