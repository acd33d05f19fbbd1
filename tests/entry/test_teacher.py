"""The teacher in a real run: it has any layout, is frozen, and never disturbs the student."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.utils import unwrap_model
from megatron.training import get_args, training

from megatron_fdd import convert, distill
from tests.entry.command import Ending, call_main, read_metrics, trained, without_seconds
from tests.entry.conftest import Toys
from tests.harness.ranks import Layout, run_on_ranks


@pytest.fixture(scope="module")
def learned(toy: Toys, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a student-shaped model only on the text's labels, as an ordinary training checkpoint."""
    folder = tmp_path_factory.mktemp("learned") / "checkpoint"
    weights = "--fdd-alpha 0 --fdd-beta 0 --fdd-kd-weight 0 --fdd-ce-weight 1".split()
    schedule = "--train-iters 16 --lr 2e-2 --lr-decay-iters 16 --save-interval 16".split()
    trained(toy.command(*weights, *schedule, "--save", folder))
    shutil.copytree(toy.tokenizer, folder / "tokenizer", dirs_exist_ok=True)
    return folder


def student_state() -> dict[str, Any]:
    """Return the state that loading a teacher must not change."""
    tracker = get_cuda_rng_tracker()
    return {
        "consumed": (
            get_args().consumed_train_samples,
            get_args().consumed_valid_samples,
            get_args().iteration,
        ),
        "host": torch.get_rng_state().tolist(),
        "tracker": {name: state.tolist() for name, state in tracker.get_states().items()},
        "shape": (get_args().num_layers, get_args().hidden_size),
    }


def watch_a_run(command: list[str]) -> dict[str, Any]:
    """Return, on one rank, the student's state before and after the teacher is built, and the owners of parameters."""
    seen: dict[str, Any] = {}
    build, setup = distill.build_teacher, training.setup_model_and_optimizer

    def watched_build(*arguments: Any) -> torch.nn.Module:
        seen["before"] = student_state()
        seen["teacher"] = build(*arguments)
        seen["after"] = student_state()
        return seen["teacher"]

    def watched_setup(*arguments: Any, **keywords: Any) -> Any:
        seen["model"], seen["optimizer"], scheduler = setup(*arguments, **keywords)
        return seen["model"], seen["optimizer"], scheduler

    with (
        patch.object(distill, "build_teacher", watched_build),
        patch.object(training, "setup_model_and_optimizer", watched_setup),
    ):
        ending = call_main(command)
    assert ending.status == 0, ending.err
    return {"ending": ending, "before": seen["before"], "after": seen["after"], **ownership(seen)}


def ownership(seen: dict[str, Any]) -> dict[str, Any]:
    teacher, [model] = seen["teacher"], seen["model"]
    mine = {id(parameter) for parameter in teacher.parameters()}
    stepped = {id(parameter) for group in seen["optimizer"].param_groups for parameter in group["params"]}
    return {
        "frozen": not any(p.requires_grad or p.grad is not None for p in teacher.parameters()),
        "evaluates": not any(module.training for module in teacher.modules()),
        "wrapped": type(teacher).__name__,
        "in student": bool(mine & {id(parameter) for parameter in unwrap_model(model).parameters()}),
        "in optimizer": bool(mine & stepped),
        "module of student": any(module is teacher for module in model.modules()),
        "stepped": len(stepped),
    }


def test_loading_it_leaves_the_student_alone(toy: Toys, learned: Path) -> None:
    """The teacher is a training checkpoint, which has a data position and a random state of its own."""
    for result in run_on_ranks(
        watch_a_run, Layout(ranks=2), {"command": toy.command("--teacher-load", learned)}
    ):
        assert result["before"] == result["after"]
        assert result["frozen"]
        assert result["evaluates"]
        assert result["wrapped"] == "GPTModel"
        assert not result["in student"]
        assert not result["in optimizer"]
        assert not result["module of student"]
        assert result["stepped"]


def teacher_reports(ending: Ending) -> tuple[list[str], bool]:
    lines = [line for line in ending.out.splitlines() if line.startswith("teacher cross-entropy")]
    return lines, "NO BETTER THAN A UNIFORM GUESS" in ending.out


def test_its_cross_entropy_is_logged_once_and_judged(toy: Toys, learned: Path) -> None:
    [bad, _], [good, _] = trained(toy.command(), toy.command("--teacher-load", learned))
    for ending, is_warned in ((bad, True), (good, False)):
        lines, warned = teacher_reports(ending)
        assert len(lines) == 1
        nats = float(lines[0].split("batch: ")[1].split()[0])
        uniform = float(lines[0].split("uniform: ")[1].rstrip(")"))
        assert uniform == pytest.approx(torch.tensor(91.0).log().item(), abs=1e-4)
        assert warned == is_warned == (nats > uniform)


def convert_again(hf: Path, to: Path) -> None:
    """Save the same weights from these ranks, with another padding of the vocabulary."""
    convert.hf_to_mcore(hf, to, vocabulary_divisor=8)


@pytest.fixture(scope="module")
def split_teacher(toy: Toys, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a copy of the toy teacher, saved by two ranks with 104 instead of 128 rows of vocabulary."""
    folder = tmp_path_factory.mktemp("split") / "teacher"
    run_on_ranks(convert_again, Layout(ranks=2), {"hf": toy.root / "teacher-hf", "to": folder})
    return folder


@pytest.mark.parametrize("layout", ["", "--tensor-model-parallel-size 2 --make-vocab-size-divisible-by 24"])
def test_its_layout_does_not_matter(layout: str, toy: Toys, split_teacher: Path, tmp_path: Path) -> None:
    paths = [tmp_path / "whole.jsonl", tmp_path / "split.jsonl"]
    commands = [
        toy.command(*layout.split(), "--teacher-load", teacher, "--fdd-metrics-file", path)
        for teacher, path in zip((toy.teacher, split_teacher), paths, strict=True)
    ]
    trained(*commands)
    whole, split = (without_seconds(read_metrics(path)) for path in paths)
    assert len(whole) == 3
    assert split == whole
