"""Flags without an effect: each is named once, on rank 0."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest

from megatron_fdd.config import FddConfig
from megatron_fdd.plan.context import Context
from megatron_fdd.plan.no_effect import warn_of_approximations, warn_of_rate


def say(config: FddConfig, rank: int) -> None:
    warn_of_approximations(Context(config, Namespace(rank=rank)))


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.0, "beta": 0.0, "sample_tokens": 0.5},
        {"alpha": 0.0, "layers": 2, "sample_one_tap": True},
        {"beta": 0.0, "layers": 1, "sample_one_tap": True},
        {"alpha": 0.0, "beta": 0.0, "teacher_lens": "L"},
    ],
)
def test_a_flag_without_effect_is_named(options: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="--(fdd-sample|teacher-lens).*no effect"):
        say(FddConfig(teacher_load="T", **options), rank=0)


def test_a_recipe_without_a_format_is_named() -> None:
    with pytest.warns(UserWarning, match="--teacher-fp8-recipe blockwise: no effect"):
        say(FddConfig(teacher_load="T", teacher_fp8_recipe="blockwise"), rank=0)


@pytest.mark.filterwarnings("error")
def test_no_warning_where_it_has_one_or_on_other_ranks() -> None:
    in_fp8 = {"teacher_fp8_recipe": "blockwise", "teacher_fp8_format": "e4m3"}
    say(FddConfig(teacher_load="T", **in_fp8), rank=0)
    say(FddConfig(teacher_load="T", teacher_fp8_recipe="blockwise"), rank=1)
    say(FddConfig(teacher_load="T", sample_one_tap=True, sample_tokens=0.5), rank=0)
    say(FddConfig(teacher_load="T", skip_below=1e-5), rank=0)
    say(FddConfig(teacher_load="T", alpha=0.0, beta=0.0, sample_tokens=0.5), rank=1)


@pytest.mark.parametrize(
    "options",
    [
        {"lens_head": "live"},
        {"beta": 0.0},
        {"delta": "centred"},
        {"kernels": "reference"},
        {"trajectory_divergence": "jsd"},
    ],
)
def test_a_bound_below_which_nothing_can_be_skipped_warns(options: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="--fdd-skip-below 1e-05: no effect, "):
        say(FddConfig(teacher_load="T", skip_below=1e-5, **options), rank=0)


def rate(**changes: object) -> Context:
    values = {"rank": 0, "lr": 0.0, "decoupled_lr": None, "skip_train": False}
    return Context(FddConfig(teacher_load="T"), Namespace(**values | changes))


def test_a_learning_rate_of_0_is_named() -> None:
    with pytest.warns(UserWarning, match="--lr 0: no weight of the student will change"):
        warn_of_rate(rate())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("changes", [{"lr": 1e-9}, {"decoupled_lr": 1e-3}, {"skip_train": True}, {"rank": 1}])
def test_a_rate_that_trains_something_is_not_named(changes: dict[str, Any]) -> None:
    warn_of_rate(rate(**changes))
