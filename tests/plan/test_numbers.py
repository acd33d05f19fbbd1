"""Numbers and schedules with which no training works; they are refused before anything is built."""

from __future__ import annotations

import pytest

from megatron_fdd.config import FddConfig
from megatron_fdd.plan.context import Context
from megatron_fdd.plan.numbers import check_given, check_numbers, check_schedule
from tests.harness.command_lines import training_parser


def given(words: str) -> Context:
    return Context(FddConfig(teacher_load="T"), training_parser().parse_args(words.split()))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lr nan", "--lr nan: must be a finite number"),
        ("--lr inf", "--lr inf: must be a finite number"),
        ("--adam-eps nan", "--adam-eps nan: must be a finite number"),
        ("--clip-grad=-inf", "--clip-grad -inf: must be a finite number"),
        ("--init-method-std inf", "--init-method-std inf: must be a finite number"),
        (
            "--seq-length -1 --log-interval 0",
            "--seq-length -1: must be at least 1; --log-interval 0: must be at least 1",
        ),
        ("--eval-iters -1", "--eval-iters -1: must be at least 0"),
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
    with pytest.raises(ValueError, match="^--") as error:
        check_numbers(given(words))
    assert {*message.split("; ")} == {*str(error.value).split("; ")}


@pytest.mark.parametrize(
    "words", ["", "--lr 0 --eval-iters 0 --seed 1 --seq-length 1", "--train-iters 0 --skip-train"]
)
def test_numbers_within_bounds_pass(words: str) -> None:
    check_numbers(given(words))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--min-lr 1", "--min-lr 1.0: must be at most --lr 0.1"),
        ("--lr-warmup-init 0.2", "--lr-warmup-init 0.2: must be at most --lr 0.1"),
        ("--start-weight-decay 2 --end-weight-decay 1", "--start-weight-decay 2.0: must be at most --end-w"),
        ("--lr-warmup-iters 10", "--lr-warmup-iters 10: must be below --train-iters 10"),
        ("--lr-warmup-iters 5 --lr-decay-iters 5", "--lr-warmup-iters 5: must be below --lr-decay-iters 5"),
        ("--lr-warmup-samples 9 --train-samples 9", "--lr-warmup-samples 9: must be below --train-samples 9"),
        (
            "--lr-decay-style WSD --lr-wsd-decay-iters 11",
            "--lr-wsd-decay-iters 11: must be at most 10, what the warm-up of 0 leaves of --train-iters 10",
        ),
        (
            "--lr-decay-style WSD --lr-wsd-decay-iters 5 --lr-decay-iters 8 --lr-warmup-iters 4",
            "--lr-wsd-decay-iters 5: must be at most 4, what the warm-up of 4 leaves of --lr-decay-iters 8",
        ),
        (
            "--lr-decay-style WSD --lr-wsd-decay-iters 8 --lr-warmup-fraction 0.25",
            "--lr-wsd-decay-iters 8: must be at most 7, what the warm-up of 3 leaves of --train-iters 10",
        ),
    ],
)
def test_schedules_that_cannot_be_are_refused(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_schedule(given(f"--lr 0.1 --train-iters 10 {words}"))
    check_schedule(given("--lr 0.1 --train-iters 10 --min-lr 0.1 --lr-warmup-iters 9"))
    wsd = "--lr 0.1 --lr-decay-style WSD --lr-wsd-decay"
    check_schedule(given(f"{wsd}-iters 6 --train-iters 10 --lr-warmup-iters 4"))
    check_schedule(given(f"{wsd}-samples 50 --train-samples 99 --lr-warmup-samples 49"))
    check_schedule(given(f"--lr 0.1 --train-iters 10 {words} --skip-train"))


@pytest.mark.parametrize("unit", ["iters", "samples"])
def test_the_last_part_of_a_schedule_that_has_one_must_be_given(unit: str) -> None:
    words = f"--seq-length 8 --micro-batch-size 1 --lr 0.1 --eval-interval 9 --train-{unit} 10 --lr-decay-style WSD"
    with pytest.raises(ValueError, match=f"^not given: --lr-wsd-decay-{unit} N "):
        check_given(given(words))
    check_given(given(f"{words} --skip-train"))
    check_given(given(f"{words} --lr-wsd-decay-{unit} 3"))
