"""The lines of a run for people."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_fdd.step.progress import Progress, Step

LOSSES = {"total": 3.2142, "kd": 1.8021, "trajectory": 1.1009, "delta": 0.3112, "ce": 4.5, "delta s2:t4": 9.9}


def progress(times: Iterator[float], said: list[str], terms: tuple[str, ...], num: int = 30) -> Progress:
    return Progress(lambda: num, terms, clock=lambda: next(times), say=said.append)


def test_a_step_is_one_line_of_at_most_120_columns() -> None:
    said: list[str] = []
    lines = progress(iter([0, 10, 16]), said, ("kd", "trajectory", "delta"))
    lines.step(Step(1, LOSSES, 2.9e-4, 1.42, 1024, 2.0))
    # 3 steps took 6 s since the first line, with validation and checkpoint: 26 steps of 2 s are left.
    lines.step(Step(4, LOSSES, None, None, 3 * 1024, 4.0))
    assert said == [
        "step   1/30 | 00:58 left | 512 tok/s | total 3.214 | kd 1.802  trajectory 1.101  delta 0.311 "
        "| lr 2.9e-04 | grad 1.42",
        "step   4/30 | 00:52 left | 768 tok/s | total 3.214 | kd 1.802  trajectory 1.101  delta 0.311 "
        "| lr - | grad -",
    ]
    assert all(len(line) <= 120 for line in said)


def test_a_weight_of_zero_is_not_shown_and_a_tap_that_was_not_drawn_is_a_dash() -> None:
    said: list[str] = []
    progress(iter([0, 1]), said, ("kd",)).evaluation("valid", 15, LOSSES)
    progress(iter([0, 1]), said, ("kd",)).evaluation("final", 30, LOSSES)
    progress(iter([0, 1]), said, ()).evaluation("test", 30, {"total": 0.0})
    progress(iter([0, 1]), said, ("delta",)).evaluation("test", 30, {"total": 1234.5, "delta": 1.5e-5})
    assert said == [
        "valid 15/30 | total 3.214 | kd 1.802",
        "final 30/30 | total 3.214 | kd 1.802",
        "test  30/30 | total 0.000",
        "test  30/30 | total 1.23e+03 | delta 1.50e-05",
    ]


def test_checkpoints_and_the_end() -> None:
    said: list[str] = []
    lines = progress(iter([0, 1, 3700, 3700]), said, ("kd",))
    lines.saved(15, "runs/x", 12.4)
    lines.saved(15, "runs/x", 0.1, is_on_disk=False)
    lines.end(None)
    lines.step(Step(15, LOSSES, 1e-4, 1.0, 1.0, 1.0))
    lines.end("runs/x")
    assert said[:3] + said[4:] == [
        "saved 15/30 | runs/x | in 12 s",
        "saved 15/30 | runs/x | in the background",
        "ended without a training step; 00:01 in all; nothing saved (no --save)",
        "stopped after step 15 of 30; 1:01:40 in all; checkpoint: runs/x",
    ]


def test_an_interruption_says_how_to_go_on() -> None:
    said: list[str] = []
    lines = progress(iter([0, 1]), said, ("kd",))
    lines.interrupted("runs/x", None)
    lines.made(7)
    lines.interrupted("runs/x", 5)
    lines.interrupted(None, None)
    assert said == [
        "interrupted before the first step of 30; no checkpoint yet in runs/x",
        "interrupted after step 7 of 30; the same command goes on after step 5, from runs/x",
        "interrupted after step 7 of 30; nothing saved (no --save)",
    ]


def test_a_finished_run_that_is_started_again_says_so() -> None:
    said: list[str] = []
    lines = progress(iter([0, 1]), said, ("kd",))
    lines.end("runs/x", loaded_iteration=30)
    assert said == [
        "nothing left to do: 30 of 30 steps were done before this start; 00:01 in all; checkpoint: runs/x"
    ]


def test_the_end_names_the_last_step_also_where_it_had_no_line() -> None:
    said: list[str] = []
    lines = progress(iter([0, 10, 16]), said, ("kd",))
    lines.step(Step(1, LOSSES, None, None, 1024, 2.0))
    lines.made(7)
    lines.end("run")
    assert said[-1].startswith("stopped after step 7 of ")
