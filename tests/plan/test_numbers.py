"""Megatron's numbers that a training cannot count with are refused before anything is built."""

from __future__ import annotations

import argparse

import pytest
from megatron.training.arguments import add_megatron_arguments

from megatron_fdd.plan import checks as preflight
from megatron_fdd.plan.checks import check_numbers


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": float("nan")}, "--lr nan: must be a finite number"),
        ({"clip_grad": float("-inf")}, "--clip-grad -inf: must be a finite number"),
        ({"init_method_std": float("inf")}, "--init-method-std inf: must be a finite number"),
        (
            {"seq_length": -1, "log_interval": 0},
            "--seq-length -1: must be at least 1; --log-interval 0: must be",
        ),
        ({"eval_iters": -1}, "--eval-iters -1: must be at least 0"),
    ],
)
def test_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_numbers(argparse.Namespace(skip_train=False, **values))


def test_taken() -> None:
    check_numbers(
        argparse.Namespace(
            skip_train=False, lr=0.0, eval_iters=0, seed=0, seq_length=1, save_interval=None, bf16=False
        )
    )


def test_every_name_with_a_bound_is_megatrons() -> None:
    parser = argparse.ArgumentParser()
    add_megatron_arguments(parser)
    assert set(preflight._SMALLEST) <= {action.dest for action in parser._actions}
