"""Errors that no check foresees: before the first step one line on each rank, afterwards the end of the log."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn
from unittest import mock

import pytest
from megatron.training import get_args

from tests.entry.command import Patch, call_main, run
from tests.entry.conftest import Toys
from tests.harness.ranks import Layout, run_on_ranks


def fail(*_: object, **__: object) -> NoReturn:
    raise KeyError("not foreseen")


def fail_without_words(*_: object, **__: object) -> NoReturn:
    raise AssertionError


def fail_in_another_package(*_: object, **__: object) -> NoReturn:
    raise ValueError("mmap length is greater than file size")


def end_without_status(*_: object, **__: object) -> NoReturn:
    """Megatron's way out where a checkpoint lacks something: Python makes status 0 of it."""
    sys.exit()


def fail_after_a_step(*_: object, **__: object) -> NoReturn:
    args = get_args()
    args.iteration, args.curr_iteration = 4, 5
    raise RuntimeError("in the middle")


@pytest.mark.parametrize(
    ("module", "name", "failure", "line"),
    [
        (
            "megatron_fdd.plan.run",
            "find_teacher",
            fail,
            r"KeyError: 'not foreseen' \(/.*/test_unforeseen\.py:\d+\)",
        ),
        (
            "megatron_fdd.distill",
            "pretrain",
            fail_without_words,
            r"`raise AssertionError` \(/.*/test_unforeseen\.py:\d+\)",
        ),
        (
            "megatron_fdd.distill",
            "pretrain",
            fail_in_another_package,
            r"mmap length is greater than file size \(/.*/test_unforeseen\.py:\d+\)",
        ),
        (
            "megatron_fdd.distill",
            "pretrain",
            end_without_status,
            r"Megatron ended this run \(/.*/test_unforeseen\.py:\d+\): give --fdd-verbose to see what it printed",
        ),
    ],
)
def test_an_error_before_the_first_step(
    module: str, name: str, failure: Callable[..., Any], line: str, toy: Toys
) -> None:
    [endings] = run(toy.command(), patches=[Patch(module, name, failure)])
    for rank, ending in enumerate(endings):
        assert ending.status == 1
        lines = [text for text in ending.err.splitlines() if "megatron_fdd: error: " in text]
        assert len(lines) == 1
        assert re.fullmatch(rf"{'rank 1: ' * rank}megatron_fdd: error: {line}", lines[0]), lines


def _crash(command: list[str]) -> None:
    with (
        mock.patch("megatron_fdd.distill.pretrain", fail_after_a_step),
        pytest.raises(RuntimeError, match="middle"),
    ):
        call_main(command)


def test_an_error_after_the_first_step_ends_the_process(toy: Toys) -> None:
    run_on_ranks(_crash, Layout(ranks=1), {"command": toy.command()})
