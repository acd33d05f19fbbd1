"""One line about any error of Megatron: its words, or the condition that it asserts, and the place."""

from __future__ import annotations

import argparse
import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_fdd.plan.megatron_errors import (
    in_one_line,
    is_of_worker,
    is_told,
    megatrons_errors,
    say_error,
)

# A module of Megatron, in small.
SOURCE = """
import argparse

def no_text(args):
    assert args.train_iters > 0

def several_lines(args):
    assert (
        args.save_interval
        % args.log_interval
        == 0
    )

def missing(args):
    assert args.micro_batch_size is not None

def of_an_object(self):
    assert self.args.lr_decay_steps > 0 and not self.is_done

def with_text(args):
    assert args.lr > 0, f"a rate of {args.lr}"

def key(args):
    return {}["fsdp"]

def by_zero(args):
    return args.train_iters // 0

def of_a_library(args):
    return argparse.Namespace(**{1: 2})

def long_text(args):
    raise RuntimeError("many\\nlines\\n" * 1000)

def leaves(args):
    exit()
"""
ARGS = argparse.Namespace(train_iters=0, save_interval=5, log_interval=3, micro_batch_size=None, lr=-1.0)
SAID = {
    "no_text": "needed is --train-iters > 0, and --train-iters is 0 (megatron/training/small.py:5)",
    "several_lines": "needed is --save-interval % --log-interval == 0, and --save-interval is 5, --log-interval is 3 "
    "(megatron/training/small.py:8)",
    "missing": "--micro-batch-size is missing (megatron/training/small.py:15)",
    "with_text": "a rate of -1.0 (megatron/training/small.py:21)",
    "key": "KeyError: 'fsdp' (megatron/training/small.py:24)",
    "by_zero": "ZeroDivisionError: integer division or modulo by zero (megatron/training/small.py:27)",
    "of_a_library": "TypeError: keywords must be strings (megatron/training/small.py:30)",
}


@pytest.fixture
def small(tmp_path: Path) -> dict[str, Callable[..., Any]]:
    path = tmp_path / "site-packages/megatron/training/small.py"
    path.parent.mkdir(parents=True)
    path.write_text(SOURCE)
    return runpy.run_path(str(path))


@pytest.mark.parametrize("name", SAID)
def test_an_error_in_one_line(name: str, small: dict[str, Callable[..., Any]]) -> None:
    with (
        pytest.raises(ValueError, match="^Megatron refuses these flags: ") as error,
        megatrons_errors("these flags"),
    ):
        small[name](ARGS)
    assert str(error.value) == f"Megatron refuses these flags: {SAID[name]}"


def test_the_condition_of_an_object(small: dict[str, Callable[..., Any]]) -> None:
    owner = argparse.Namespace(args=argparse.Namespace(lr_decay_steps=0), is_done=True)
    with pytest.raises(AssertionError) as error:
        small["of_an_object"](owner)
    said = "needed is self.args.lr_decay_steps > 0 and (not self.is_done), and "
    assert in_one_line(error.value).startswith(f"{said}self.args.lr_decay_steps is 0, self.is_done is True (")


def test_a_long_text_is_cut(small: dict[str, Callable[..., Any]]) -> None:
    with pytest.raises(RuntimeError) as error:
        small["long_text"](ARGS)
    assert len(in_one_line(error.value).splitlines()) == 1
    assert in_one_line(error.value).startswith("RuntimeError: many lines many")
    assert in_one_line(error.value).endswith(" ... (megatron/training/small.py:33)")
    assert len(in_one_line(error.value)) < 500


def test_an_exit_is_an_error_too(small: dict[str, Callable[..., Any]]) -> None:
    """Megatron leaves with status 0 at some flags, after a printed remark."""
    pattern = r"it exits at megatron/training/small\.py:36; give --fdd-verbose to see"
    with pytest.raises(ValueError, match=pattern), megatrons_errors("these flags"):
        small["leaves"](ARGS)


def test_without_its_source_the_line_is_still_one(tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as error:
        exec(compile("\n\nassert None", str(tmp_path / "gone.py"), "exec"))
    assert in_one_line(error.value) == f"a condition without a text ({tmp_path}/gone.py:3)"


def test_the_place_is_in_somebodys_own_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import json\ndef bug(_):\n    json.loads('{')\n")
    own = runpy.run_path(str(tmp_path / "mine.py"))
    with pytest.raises(ValueError, match="Expecting") as error:
        json.JSONEncoder(default=own["bug"]).encode(object())
    assert in_one_line(error.value).endswith(f"({tmp_path}/mine.py:3)")


def test_a_data_process_that_the_system_ended(capsys: pytest.CaptureFixture[str]) -> None:
    """torch notices it wherever the training is, so that a place tells nothing."""
    with pytest.raises(RuntimeError) as raised:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    say_error(raised.value, "run/iter_0000002")
    assert capsys.readouterr().err == (
        "megatron_fdd: error: a process of --num-workers, which reads data, was ended (DataLoader worker (pid 7) is "
        "killed by signal: Killed); where memory ran out, give fewer. The same command then goes on from "
        "run/iter_0000002\n"
    )
    assert not is_of_worker(RuntimeError("killed by signal"))
    assert not is_of_worker(ConnectionResetError(104, "Connection reset by peer"))


def test_a_batch_that_cannot_be_taken_from_such_a_process() -> None:
    def next_batch() -> None:
        raise ConnectionResetError(104, "Connection reset by peer")

    code = next_batch.__code__.replace(co_filename="site-packages/torch/utils/data/dataloader.py")
    with pytest.raises(ConnectionResetError) as raised:
        exec(code)
    assert is_of_worker(raised.value)
    assert is_told(raised.value)
