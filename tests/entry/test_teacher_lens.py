"""`--teacher-lens` from the command line: planned, trained with, and refused for another teacher."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch

import examples.extend.tuned_lens  # noqa: F401  # adds the lens
from megatron_fdd.host.checkpoint import find_checkpoint, read_checkpoint_args
from megatron_fdd.step.teacher.lens_file import TeacherIdentity, write_lens
from tests.entry.checks import assert_refused
from tests.entry.command import read_metrics, run, trained, without_seconds
from tests.entry.conftest import Toys


def test_a_run_with_a_lens_file(toy: Toys, tmp_path: Path) -> None:
    checkpoint = find_checkpoint(str(toy.teacher), "--teacher-load")
    teacher = TeacherIdentity.read(checkpoint, read_checkpoint_args(checkpoint, "--teacher-load"))
    torch.manual_seed(1)
    maps = {block: {"weight": torch.randn(48, 48), "bias": torch.randn(48)} for block in (2, 4)}
    zeros = {block: {name: each * 0 for name, each in tensors.items()} for block, tensors in maps.items()}
    write_lens(tmp_path / "zeros", "tuned", teacher, zeros)
    write_lens(tmp_path / "maps", "tuned", teacher, maps)
    write_lens(tmp_path / "other", "tuned", replace(teacher, final_norm="0" * 64), maps)

    def command(name: str, *more: object) -> list[str]:
        flags = ("--fdd-plugin", "examples.extend.tuned_lens", "--teacher-lens", tmp_path / name)
        return toy.command(*flags, "--fdd-metrics-file", tmp_path / f"{name}.jsonl", *more)

    pipeline = ("--pipeline-model-parallel-size", 2)
    bare = toy.command("--fdd-metrics-file", tmp_path / "bare.jsonl", *pipeline)
    planned, *_ = trained(
        command("maps", "--fdd-dry-run"), bare, command("zeros", *pipeline), command("maps")
    )
    assert f"\n  lens of the teacher's inner layers: tuned, from {tmp_path}/maps\n" in planned[0].out
    assert re.search(r"^    teacher's lens, tensors of its blocks: 0\.0$", planned[0].out, re.MULTILINE)
    records = {name: read_metrics(tmp_path / f"{name}.jsonl") for name in ("bare", "zeros", "maps")}
    assert without_seconds(records["zeros"]) == without_seconds(records["bare"])
    assert records["maps"][0]["kd"] == records["bare"][0]["kd"]
    assert records["maps"][0]["trajectory s1:t2"] != records["bare"][0]["trajectory s1:t2"]
    (refused,) = run(command("other"))
    assert_refused(refused, f"error: --teacher-lens {tmp_path}/other: was made for another teacher")
