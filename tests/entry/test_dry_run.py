"""`--fdd-dry-run` and `--help`: the output for a user before anything is loaded."""

from __future__ import annotations

import os
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_fdd import convert
from megatron_fdd.host.role import Role
from megatron_fdd.plan.context import Model, StoredModel
from megatron_fdd.plan.fp8_scales import check_teacher_scales
from tests.convert import toys
from tests.entry.checks import assert_refused
from tests.entry.command import Patch, run, trained
from tests.entry.conftest import SCRATCH, Toys, make_checkpoint
from tests.harness.ranks import Layout, run_on_ranks


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
    assert len(lines) < 35
    for wanted in (
        r"^ +1 <- 2$",
        r"^ +2 <- 4$",
        r"2 rank\(s\) = tensor 2 x context 1 x pipeline 1 x data 1, sequence parallel on",
        r"tensor rank 0: vocabulary 0\.\.90, 128 rows",
        r"    \d+ more row\(s\) of the student are no token of the tokenizer",
        r"tensor rank 1: padding only, 128 rows",
        r"teacher weights: \d+\.\d",
        r"stage 0: student blocks 1\.\.4, taps s1:t2, s2:t4; holds both heads$",
        r"teacher taps, 2 x 1 micro-batch\(es\): \d+\.\d",
    ):
        assert re.search(wanted, first.out, re.MULTILINE), wanted


def test_the_plan_of_a_pipeline_says_who_does_what(toy: Toys) -> None:
    flags = "--fdd-dry-run --pipeline-model-parallel-size 2 --fdd-layer-pairs 1:2,4:6".split()
    sampled = "--fdd-sample-tokens 0.25 --fdd-sample-one-tap".split()
    [endings] = trained(toy.command(*flags, *sampled))
    for wanted in (
        r"inner layers of a training step: 0\.25 of the tokens, one random tap a step$",
        r"stage 0: student blocks 1\.\.2, taps s1:t2; holds both heads; sends on s1:t2$",
        r"stage 1: student blocks 3\.\.4, taps s4:t6; holds both heads$",
        r"teacher taps, 2 x 4 micro-batch\(es\): \d+\.\d",
        r"stage 0: 2 layer\(s\), 1 tap\(s\): [\d.e-]+ with taps, [\d.e-]+ without",
        r"bubble with 4 micro-batch\(es\): [\d.]+% of a step; without taps [\d.]+%",
    ):
        assert re.search(wanted, endings[0].out, re.MULTILINE), wanted


def test_a_plan_of_many_ranks_before_there_are_weights(toy: Toys, tmp_path: Path) -> None:
    """One process plans 64 ranks and a mixture of experts that is only a config.json; a real run with it is refused."""
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    arguments = {"variant": "qwen3_moe", "num_hidden_layers": 10, "num_local_experts": 8, "num_experts": 8}
    run_on_ranks(config_only, Layout(ranks=1), {"folder": teacher, "changes": arguments})
    changes = {"num_hidden_layers": 8, "num_key_value_heads": 12}
    run_on_ranks(config_only, Layout(ranks=1), {"folder": student, "changes": changes})
    given = ("--load", student / "plan", "--teacher-load", teacher / "plan", "--global-batch-size", "64")
    layout = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 4 --sequence-parallel"
    experts = "--teacher-expert-model-parallel-size 8 --expert-tensor-parallel-size 1"
    command = toy.mock_command(*given, *layout.split(), *experts.split())
    launched = {"WORLD_SIZE": "64", "RANK": "0", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    launch = [Patch("os", "environ", {**os.environ, **launched})]
    [[planned]] = trained([*command, "--fdd-dry-run"], ranks=1, patches=[*NO_RUN, *launch])
    assert "64 rank(s) = tensor 2 x context 1 x pipeline 4 x data 8" in planned.out
    assert "experts of the teacher: 8 in each of 10 layer(s), 3 to a token; 1 on a rank" in planned.out
    assert re.search(r"^    sum: \d+\.\d$", planned.out, re.MULTILINE)
    # A checkpoint without weights need not have scales.
    stored = StoredModel("T", "--teacher-load", teacher / "plan" / "release", Namespace())
    check_teacher_scales(Model(Role.TEACHER, Namespace(fp8="e4m3", fp8_recipe="delayed"), stored))
    [[refused]] = run(command, ranks=1, patches=[*NO_RUN, *launch])
    assert refused.status == 1
    assert "--load" in refused.err
    assert "no weights" in refused.err


def config_only(folder: Path, changes: dict[str, Any]) -> None:
    """Make, on one rank, `folder/plan` from a config.json and a tokenizer."""
    toys.make_tokenizer(folder)
    toys.write_json(folder / "config.json", toys.llama_config(**changes))
    convert.config_to_mcore(folder, folder / "plan")


FP8 = "--bf16 --fp8-format hybrid --fp8-recipe tensorwise --teacher-fp8-format e4m3 --fdd-dry-run".split()


def test_a_plan_of_fp8_needs_no_transformer_engine(toy: Toys) -> None:
    """Try widths that FP8 takes, and widths that it does not take."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4}
    run_on_ranks(
        make_checkpoint,
        Layout(ranks=1),
        {"root": toy.root, "name": "fp8", "changes": {**shape, "head_dim": 16}},
    )
    wide = toy.mock_command("--load", toy.root / "fp8", "--teacher-load", toy.root / "fp8", "--fdd-layers", 1)
    [[planned]] = trained([*wide, *FP8, "--fdd-beta", "0"], ranks=1, patches=NO_RUN)
    assert re.search(r"student weights, copies in FP8: [\d.]*[1-9]", planned.out)
    assert re.search(r"teacher weights in FP8: [\d.]*[1-9]", planned.out)
    for refused in run([*wide, *FP8, "--fdd-beta", "0", "--seq-length", "20"], toy.command(*FP8), ranks=1):
        assert_refused(refused, r"FP8 with recipe tensorwise for the student: not a multiple: ")


def test_a_plan_of_experts_in_fp8_needs_no_transformer_engine(toy: Toys, tmp_path: Path) -> None:
    """Megatron's own configuration would need it."""
    words = toy.mock_command(*SCRATCH, *FP8, "--load", tmp_path, "--save", tmp_path, "--save-interval", 1)
    words.remove("--use-checkpoint-args")
    words += "--ffn-hidden-size 64 --num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type alltoall".split()
    words += "--fdd-kd-weight 0 --fdd-alpha 0 --fdd-beta 0 --fdd-ce-weight 1".split()
    [[planned]] = trained(words, ranks=1, patches=NO_RUN)
    assert "experts of the student: 4" in planned.out
    assert re.search(r"student weights, copies in FP8: [\d.]*[1-9]", planned.out)


def test_without_a_teacher_there_is_a_plan_too(toy: Toys) -> None:
    weights = "--fdd-alpha 0 --fdd-beta 0 --fdd-kd-weight 0 --fdd-ce-weight 1".split()
    [endings] = trained(toy.command("--fdd-dry-run", *weights))
    assert "no inner layers" in endings[0].out


def test_help_shows_the_flags() -> None:
    [[ending, _]] = run(["--help"])
    assert ending.status == 0
    _, *groups = re.split(r"^distillation: .*:$", ending.out, flags=re.MULTILINE)
    for group, flag in zip(
        groups,
        (
            "--teacher-load DIR",
            "--fdd-layers K",
            "--fdd-kd-divergence {fkl,rkl,jsd,sfkl,srkl}",
            "--fdd-sample-tokens F",
            "--fdd-dry-run",
        ),
        strict=True,
    ):
        assert flag in group
    assert "torchrun" in ending.out.splitlines()[0]
