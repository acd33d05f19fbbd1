"""Mistakes that Megatron would report late or without a remedy: one clear error, in the run and in the dry run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.entry.checks import assert_refused
from tests.entry.command import run
from tests.entry.conftest import Toys

# (flag to leave out with its value, flags to add, message)
MISTAKES = {
    "no learning rate": ("--lr", "", r"not given: --lr X"),
    "no iterations": ("--train-iters", "", r"not given: --train-iters N or --train-samples N"),
    "no micro-batch": ("--micro-batch-size", "", r"not given: --micro-batch-size N"),
    "no length": ("--seq-length", "", r"not given: --seq-length N"),
    "no evaluation interval": ("--eval-interval", "", r"not given: --eval-interval N"),
    "no numbers": (
        "--log-interval",
        "--log-interval 0 --lr nan",
        r"--lr nan: must be a finite number; --log-interval 0: must be at least 1",
    ),
    "a rise downwards": ("--lr", "--lr 0.1 --min-lr 0.2", r"--min-lr 0.2: must be at most --lr 0.1"),
    "odd length": (
        "--seq-length",
        "--seq-length 15 --tensor-model-parallel-size 2 --sequence-parallel",
        r"--seq-length 15 is not a multiple of --tensor-model-parallel-size 2.*use 14 or 16",
    ),
    "length of pieces": (
        "--seq-length",
        "--seq-length 18 --context-parallel-size 2",
        r"--seq-length 18 is not a multiple of twice --context-parallel-size 2: use 16 or 20",
    ),
    "heads": (
        "--seed",
        "--tensor-model-parallel-size 2 --num-attention-heads 4 --num-query-groups 2 --group-query-attention "
        "--tensor-model-parallel-size 8",
        r"--tensor-model-parallel-size 8 does not divide the student's 4 attention heads",
    ),
    "layers": (
        "--seed",
        "--pipeline-model-parallel-size 3",
        r"--pipeline-model-parallel-size 3 does not divide the student's 4 layers.*layout 'Ett\|t\|tL'",
    ),
}


def without(words: list[str], flag: str) -> list[str]:
    at = words.index(flag)
    return words[:at] + words[at + 2 :]


@pytest.mark.parametrize("name", MISTAKES)
def test_one_line_in_the_run_and_the_dry_run(name: str, toy: Toys) -> None:
    flag, more, message = MISTAKES[name]
    command = [*without(toy.command(), flag), *more.split()]
    for endings in run(command, [*command, "--fdd-dry-run"]):
        for ending in endings:
            assert ending.status == 1
        assert re.search(rf"megatron_fdd: error: .*{message}", endings[0].err, re.DOTALL), endings[0].err


@pytest.mark.parametrize("flag", ["--fdd-metrics-file", "--save"])
def test_a_place_that_cannot_be_written(flag: str, toy: Toys, tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    [endings] = run(toy.command(flag, in_the_way / "below"))
    assert [ending.status for ending in endings] == [1, 1]
    assert re.search(rf"{flag} .*cannot be written", endings[0].err)


def test_a_finished_run_is_not_begun_again(toy: Toys, tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("400")
    command = toy.saving_command(tmp_path)
    for endings in run(command, [*command, "--fdd-dry-run"]):
        assert_refused(endings, rf"--save {tmp_path}: holds a checkpoint of iteration 400")
    assert [path.name for path in tmp_path.iterdir()] == ["latest_checkpointed_iteration.txt"]


def test_nothing_to_take_the_architecture_from(toy: Toys, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    command = toy.command("--load", empty, "--save", empty)
    [endings] = run(command)
    assert "name the student to start from with --pretrained-checkpoint" in endings[0].err
