"""Learning rates and schedules that train nothing, or less than they say."""

from __future__ import annotations

import re
import warnings
from argparse import Namespace

import pytest

from megatron_fdd.config import FddConfig
from megatron_fdd.plan.context import Context
from megatron_fdd.plan.rates import warn_of_rate
from tests.harness.command_lines import training_parser


def said(words: str, rank: int = 0) -> list[str]:
    """Return the warnings about the rate of a run."""
    args: Namespace = training_parser().parse_args(f"--lr 1e-3 {words}".split())
    args.rank = rank
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warn_of_rate(Context(FddConfig(teacher_load="T"), args))
    return [str(each.message) for each in found]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--train-iters 9 --lr 0", "--lr 0: no weight of the student will change; give a rate above 0"),
        (
            "--train-iters 9 --lr 0 --moe-router-enable-expert-bias --moe-router-bias-update-rate 0.01",
            "--lr 0: no weight of the student will change but expert biases (--moe-router-bias-update-rate 0.01); give",
        ),
        (
            "--train-iters 10 --lr-decay-iters 100 --lr-warmup-iters 50",
            "--lr-warmup-iters 50: the training ends after 10 iterations, inside of the warm-up, and the rate never "
            "rises to --lr 0.001; lower it",
        ),
        (
            "--train-iters 10 --lr-decay-iters 100 --lr-warmup-iters 10",
            "--lr-warmup-iters 10: the training ends",
        ),
        (
            "--train-samples 80 --lr-decay-samples 999 --lr-warmup-samples 80",
            "--lr-warmup-samples 80: the training ends after 80 samples, inside",
        ),
        (
            "--train-iters 10 --lr-decay-iters 100 --lr-warmup-fraction 0.5",
            "--lr-warmup-fraction 0.5 of --lr-decay-iters 100: the training ends after 10 iterations",
        ),
        (
            "--train-iters 10 --lr-decay-iters 4",
            "--lr-decay-iters 4: from there on the rate is --min-lr 0, and in the last 6 of 10 iterations no weight",
        ),
        (
            "--train-samples 10 --lr-decay-samples 4 --lr-decay-style cosine",
            "--lr-decay-samples 4: from there on the rate is --min-lr 0, and in the last 6 of 10 samples",
        ),
        (
            "--train-iters 10 --lr-wsd-decay-iters 3 --lr-wsd-decay-style linear",
            "--lr-wsd-decay-iters 3, --lr-wsd-decay-style linear: no effect, only --lr-decay-style WSD",
        ),
        (
            "--train-iters 10 --lr-decay-style constant --min-lr 1e-5",
            "--min-lr 1e-05: no effect, with --lr-decay-style constant the rate never falls; leave it out",
        ),
        (
            "--train-iters 10 --lr-decay-style constant --lr-decay-iters 4",
            "--lr-decay-iters 4: no effect, with --lr-decay-style constant",
        ),
        ("--train-iters 10 --lr-warmup-init 1e-5", "--lr-warmup-init 1e-05: no effect, there is no warm-up"),
        (
            "--train-iters 10 --decoupled-min-lr 1e-5",
            "--decoupled-min-lr 1e-05: no effect, there is no --decoupled-lr",
        ),
    ],
)
def test_a_schedule_that_does_not_do_what_it_says(words: str, line: str) -> None:
    [message] = said(words)
    assert re.match(re.escape(line), message)
    assert said(words, rank=1) == []
    assert said(f"{words} --skip-train") == []


@pytest.mark.parametrize(
    "words",
    [
        "--train-iters 10",
        "--train-iters 10 --lr 0 --decoupled-lr 1e-3",
        "--train-iters 10 --lr-warmup-iters 9",
        "--train-iters 10 --lr-decay-iters 100 --lr-warmup-iters 9 --lr-warmup-init 1e-5",
        "--train-iters 10 --lr-decay-iters 4 --min-lr 1e-5",
        "--train-iters 10 --lr-decay-style constant --lr-decay-iters 4 --lr-warmup-fraction 0.5",
        "--train-samples 80 --lr-decay-samples 999 --lr-warmup-samples 79",
        "--train-iters 10 --lr-decay-style WSD --lr-wsd-decay-iters 3 --lr-wsd-decay-style linear",
        "--train-iters 10 --decoupled-lr 1e-3 --decoupled-min-lr 1e-5",
    ],
)
def test_a_schedule_that_does(words: str) -> None:
    assert said(words) == []
