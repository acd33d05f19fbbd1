"""The benchmark of a whole step: its arithmetic, compared with known ratios and counted products, and a tiny run."""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from benchmarks import lines, modelopt, step
from benchmarks.step_flops import Model, StepFlops, step_flops
from benchmarks.step_report import round_ratios
from benchmarks.step_run import WARM_UP_STEPS, WATCHED_STEPS, Job, StepWatch, Watched
from megatron_fdd.plan.model_shape import ModelShape
from tests.harness.ranks import Layout, clean_megatron, run_on_ranks
from tests.oracle.model_shapes import (
    GPT2,
    GPT2_XL,
    LLAMA2_13B,
    LLAMA3_8B,
    LLAMA3_70B,
    QWEN3_2B,
    QWEN3_32B,
    SMOLLM2,
    TINY_LLAMA,
)


def layers_and_heads(flops: StepFlops) -> float:
    """Return the flops in the published ratios: without attention scores, Gram matrices or quadratic forms."""
    return flops.teacher + flops.student + flops.final + flops.taps


@pytest.mark.parametrize(
    ("student", "teacher", "ratio"),
    [
        ((GPT2, 12), (GPT2_XL, 48), 1.41),
        ((SMOLLM2, 10), (SMOLLM2, 30), 2.39),
        ((QWEN3_2B, 28), (QWEN3_32B, 64), 1.18),
        ((TINY_LLAMA, 22), (LLAMA2_13B, 40), 1.09),
        ((LLAMA3_8B, 32), (LLAMA3_70B, 80), 1.11),
    ],
)
def test_ratio_to_logit_distillation(
    student: tuple[ModelShape, int], teacher: tuple[ModelShape, int], ratio: float
) -> None:
    pair = Model(*student), Model(*teacher)
    kd, fdd = (step_flops(*pair, name, num_taps=4, step_tokens=2**20) for name in ("logit KD", "FDD"))
    assert layers_and_heads(fdd) / layers_and_heads(kd) == pytest.approx(ratio, abs=0.005)
    # The parts that those leave out: scores are equal in both, and the forms have no factor of the vocabulary.
    assert fdd.total / kd.total == pytest.approx(ratio, rel=0.025)


def test_a_divided_shape_has_the_ratio_of_the_whole() -> None:
    args, _ = step.parse_args([])
    small = [
        replace(each, shape=replace(each.shape, seq_length=0))
        for each in (step.model_of(args, "student"), step.model_of(args, "teacher"))
    ]
    ratios = []
    for pair in (small, (Model(GPT2, 12), Model(GPT2_XL, 48))):
        kd, fdd = (step_flops(*pair, name, num_taps=4, step_tokens=2**20) for name in ("logit KD", "FDD"))
        ratios.append(layers_and_heads(fdd) / layers_and_heads(kd))
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-3)


def smoke(picture: Path, rows: Path) -> tuple[int, str, list[Any]]:
    """Run, on one rank, the command with all four runs in this process."""
    runs = []

    def here(_pool: None, function: Callable[..., Any], *arguments: Any) -> Any:
        result = function(*arguments)
        clean_megatron()
        if result is not None:
            runs.append((result.flops, result.losses, result.parts))
        return result

    printed = io.StringIO()
    with (
        patch.object(step, "in_own_process", here),
        patch.object(step, "new_process", lambda _device: contextlib.nullcontext()),
        contextlib.redirect_stdout(printed),
    ):
        status = step.main(["--smoke", "--cross-entropy", "--profile", str(picture), "--lines", str(rows)])
    return status, printed.getvalue(), runs


def test_tiny_run_does_the_products_that_the_arithmetic_says(tmp_path: Path) -> None:
    picture, rows = tmp_path / "profile.png", tmp_path / "rows.jsonl"
    given = {"picture": picture, "rows": rows}
    [(status, printed, runs)] = run_on_ranks(smoke, Layout(ranks=1), given)
    assert status == 0
    names = [*step.WEIGHTS, step.STOCK]
    assert names[:2] == ["FDD", "logit KD"], "what is most worth knowing comes first"
    assert all(name in printed for name in names)
    wanted = [{"ce", "kd", "trajectory", "delta"}, {"ce", "kd"}, {"ce"}, set()]
    assert [set(losses) for _, losses, _ in runs] == wanted
    written = lines.read(rows, "step")
    assert [line["objective"] for line in written] == names
    assert [(line["losses"], line["parts"]) for line in written] == [seen[1:] for seen in runs]
    args, _ = step.parse_args(["--smoke"])
    student, teacher = step.model_of(args, "student"), step.model_of(args, "teacher")
    tokens = args.seq_length * args.micro_batch_size
    for (counted, _, _), name in zip(runs[:3], step.WEIGHTS, strict=True):
        flops = step_flops(student, teacher, name, num_taps=args.taps, step_tokens=tokens)
        # The attention of a rehearsal computes the masked half too.
        assert counted == pytest.approx(tokens * (flops.total + flops.scores), rel=1e-9), name
    assert picture.stat().st_size > 5000
    fdd, kd, entropy, stock = (parts for _, _, parts in runs)
    assert stock == {}
    for parts, empty in (
        (entropy, {"teacher", "inner layers' losses"}),
        (kd, {"inner layers' losses"}),
        (fdd, set()),
    ):
        assert {name for name, seconds in parts.items() if seconds == 0} == empty
        assert min(parts.values()) >= 0


@pytest.mark.parametrize(("name", "flag"), [("step", "--teacher-layers"), ("modelopt", "--top-k")])
def test_help(
    name: str, flag: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.delitem(sys.modules, f"benchmarks.{name}")  # runpy warns if the module is loaded
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")
    assert end.value.code == 0
    assert flag in capsys.readouterr().out


def test_modelopt_is_left_out_where_it_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    with patch.object(modelopt.importlib.util, "find_spec", return_value=None):
        assert modelopt.main([]) == 0
    assert "pip install nvidia-modelopt" in capsys.readouterr().out


class Clock:
    """A clock that stands still unless a test moves it."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s


def test_what_fails_or_does_not_fit_into_the_time_leaves_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock, begun = Clock(), []

    def here(_pool: None, function: Callable[..., Any], *arguments: Any) -> Any:
        if function is step.make_checkpoint:
            return None
        clock.now_s += 40
        begun.append(arguments[0])
        if len(begun) == 1:
            raise RuntimeError("made to fail")
        return Watched(seconds=[1.0, 1.0], losses={"kd": 2.0})

    monkeypatch.setattr(step, "time", clock)
    monkeypatch.setattr(step, "in_own_process", here)
    monkeypatch.setattr(step, "new_process", lambda _device: contextlib.nullcontext())
    rows = tmp_path / "rows.jsonl"
    flags = ["--smoke", "--cross-entropy", "--budget-s", "100", "--lines", str(rows)]
    assert step.main([*flags, "--models", str(tmp_path)]) == 1
    assert [job.repeats for job in begun] == [2, 2], "one set of repeats"
    assert [line["objective"] for line in lines.read(rows)] == ["logit KD"]
    printed = capsys.readouterr()
    assert "FDD: made to fail" in printed.err
    assert "cross-entropy: not begun: 20 s are left and the last run took 40 s" in printed.out


def jobs_in_turns(folder: Path, repeats: int) -> dict[str, Job]:
    turns = threading.Barrier(2)
    return {
        name: Job(
            (), is_stock=False, repeats=repeats, device="cpu", log=folder / name, turns=turns, turn=turn
        )
        for turn, name in enumerate(("A", "B"))
    }


def test_by_turns_each_timed_step_has_the_machine_to_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def train(_pool: None, _run_job: Callable[..., Any], job: Job) -> Watched:
        name = job.log.name

        def train_step() -> None:
            order.append(f"{name} begins")
            order.append(f"{name} ends")

        watch = StepWatch(train_step, job)
        for _ in range(job.repeats + WARM_UP_STEPS + 1):
            watch()
        return watch.watched

    monkeypatch.setattr(step, "in_own_process", train)
    shown: list[str] = []
    jobs = jobs_in_turns(tmp_path, repeats=3)
    watched = step.watch_in_turns(jobs, dict.fromkeys(jobs), lambda name, _seen: shown.append(name))
    assert shown == ["A", "B"]
    assert [len(seen.seconds) for seen in watched.values()] == [3, 3]
    timed = order[2 * 2 * WARM_UP_STEPS :]
    assert timed == ["A begins", "A ends", "B begins", "B ends"] * (3 + WATCHED_STEPS - 1)


def test_by_turns_a_failure_ends_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(_pool: None, _run_job: Callable[..., Any], job: Job) -> Watched:
        assert job.turns is not None
        if job.turn == 1:
            raise RuntimeError("made to fail")
        job.turns.wait()
        return Watched()

    monkeypatch.setattr(step, "in_own_process", train)
    jobs = jobs_in_turns(tmp_path, repeats=3)
    assert step.watch_in_turns(jobs, dict.fromkeys(jobs), lambda _name, _seen: None) == {}
    assert capsys.readouterr().err == "B: made to fail\n\n"


def test_the_ratio_by_turns_is_that_of_the_rounds() -> None:
    assert round_ratios([2.0, 6.0, 5.0], [1.0, 2.0, 2.0]) == (2.25, 2.5, 2.75)
