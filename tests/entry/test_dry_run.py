"""`--fdd-dry-run` and `--help`: what a user sees before anything is loaded."""

from __future__ import annotations

import re

from tests.entry.command import Patch, run, trained
from tests.entry.conftest import Toys


def refuse_to_run(*_arguments: object) -> None:
    raise AssertionError("a dry run must not get here")


NO_RUN = [
    Patch("megatron_fdd.distill", "pretrain", refuse_to_run),
    Patch("megatron_fdd.distill", "build_teacher", refuse_to_run),
]


def test_the_plan_is_all_that_is_printed(toy: Toys) -> None:
    command = toy.command("--fdd-dry-run", *"--tensor-model-parallel-size 2 --sequence-parallel".split())
    [[first, second]] = trained(command, patches=NO_RUN)
    assert second.out == ""
    lines = first.out.splitlines()
    assert lines[0].startswith("Feature dynamics distillation")
    assert len(lines) < 30
    for wanted in (
        r"^ +1 <- 2$",
        r"^ +2 <- 4$",
        r"2 rank\(s\) = tensor 2 x data 1, sequence parallel on",
        r"tensor rank 0: vocabulary 0\.\.90, 128 rows",
        r"tensor rank 1: padding only, 128 rows",
        r"teacher weights: \d+\.\d",
        r"taps of one micro-batch.*: \d+\.\d",
    ):
        assert re.search(wanted, first.out, re.MULTILINE), wanted


def test_without_a_teacher_there_is_a_plan_too(toy: Toys) -> None:
    [endings] = trained(toy.command("--fdd-dry-run", *"--fdd-alpha 0 --fdd-beta 0 --fdd-kd-weight 0".split()))
    assert "no inner layers" in endings[0].out


def test_help_shows_the_flags() -> None:
    [[ending, _]] = run(["--help"])
    assert ending.status == 0
    group = ending.out.split("feature dynamics distillation:")[1]
    for flag in (
        "--teacher-load DIR",
        "--fdd-layers K",
        "--fdd-kd-divergence {fkl,rkl,jsd,sfkl,srkl}",
        "--fdd-dry-run",
    ):
        assert flag in group
    assert "torchrun" in ending.out.splitlines()[0]
