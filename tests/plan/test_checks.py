"""Values that Megatron would take and fail on late, or silently: empty texts, numbers out of bounds, schedules."""

from __future__ import annotations

import argparse
from functools import cache

import pytest
from megatron.training.arguments import add_megatron_arguments

from megatron_fdd.plan import run
from megatron_fdd.plan.checks import check_numbers, check_schedule


@cache
def parser() -> argparse.ArgumentParser:
    """Megatron's with our flags, as a run makes it."""
    with pytest.MonkeyPatch.context() as patch:
        megatrons = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
        patch.setattr(run, "parse_args", lambda add_args: add_args(megatrons))
        run._parse()
    return megatrons


def parse(words: str) -> argparse.Namespace:
    return parser().parse_args(words.split())


def test_every_flag_refuses_an_empty_value_by_name() -> None:
    flags = [
        action.option_strings[-1]
        for action in parser()._actions
        if action.option_strings and action.nargs != 0 and action.default != ""
    ]
    assert {"--save", "--load", "--split", "--teacher-load", "--fdd-metrics-file", "--data-path"} < {*flags}
    for flag in flags:
        with pytest.raises(
            ValueError, match=rf"{flag}\b.*(its value is empty|invalid (int|float) value: ''|expected)"
        ):
            parser().parse_args([f"{flag}="])


def test_an_empty_value_among_others_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--data-path: its value is empty \(an unset variable\?\)"):
        parser().parse_args(["--data-path", "0.5", "", "0.5", "b"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--train-iters 0", "--train-iters 0: must be at least 1"),
        ("--hidden-dropout 1.5", "--hidden-dropout 1.5: must be below 1"),
        ("--attention-dropout -1", "--attention-dropout -1.0: must be at least 0"),
        ("--attention-dropout 1", "--attention-dropout 1.0: must be below 1"),
        ("--lr-warmup-fraction 2", "--lr-warmup-fraction 2.0: must be below 1"),
        ("--adam-beta1 1", "--adam-beta1 1.0: must be below 1"),
        ("--adam-beta2 1.1", "--adam-beta2 1.1: must be below 1"),
    ],
)
def test_numbers_out_of_bounds_are_refused(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_numbers(parse(words))


def test_an_evaluation_makes_no_steps() -> None:
    check_numbers(parse("--train-iters 0 --skip-train"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--min-lr 1", "--min-lr 1.0: must be at most --lr 0.1"),
        ("--lr-warmup-init 0.2", "--lr-warmup-init 0.2: must be at most --lr 0.1"),
        ("--start-weight-decay 2 --end-weight-decay 1", "--start-weight-decay 2.0: must be at most --end-w"),
        ("--lr-warmup-iters 10", "--lr-warmup-iters 10: must be below --train-iters 10"),
        ("--lr-warmup-iters 5 --lr-decay-iters 5", "--lr-warmup-iters 5: must be below --lr-decay-iters 5"),
        ("--lr-warmup-samples 9 --train-samples 9", "--lr-warmup-samples 9: must be below --train-samples 9"),
    ],
)
def test_schedules_that_cannot_be_are_refused(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_schedule(parse(f"--lr 0.1 --train-iters 10 {words}"))
    check_schedule(parse("--lr 0.1 --train-iters 10 --min-lr 0.1 --lr-warmup-iters 9"))
    check_schedule(parse(f"--lr 0.1 --train-iters 10 {words} --skip-train"))
