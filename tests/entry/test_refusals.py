"""Refusals, in the run and in the dry run, of flags that would silently distil nothing, or something wrong."""

from __future__ import annotations

import argparse
import importlib.util
import re

import pytest

from megatron_fdd.config import FddConfig
from megatron_fdd.plan.context import Context
from megatron_fdd.plan.refusals import REFUSALS, check_refusals
from tests.entry.checks import assert_refused
from tests.entry.command import Patch, run
from tests.entry.conftest import Toys

# The text that the message must have, for each row of REFUSALS, and command lines that the row applies to.
COMMANDS: dict[str, tuple[str, ...]] = {
    r"^--mtp-num-layers: .*without it": ("--mtp-num-layers 1",),
    r"^--overlap-moe-expert-parallel-comm: .*leave it out": ("--overlap-moe-expert-parallel-comm",),
    r"^--cuda-graph-impl full_iteration: .*use local": ("--cuda-graph-impl full_iteration",),
    r"^--moe-expert-rank-capacity-factor: .*leave it out": ("--moe-expert-rank-capacity-factor 1.5",),
    r"^--use-megatron-fsdp.*use --use-distributed-optimizer": ("--use-megatron-fsdp", "--use-torch-fsdp2"),
    r"^--defer-embedding-wgrad-compute: .*leave it out": ("--defer-embedding-wgrad-compute",),
    r"^--hybrid-context-parallel: .*leave it out": ("--hybrid-context-parallel",),
    r"^--logits-load-dir, --logits-save-dir: .*without --teacher-load": (
        "--logits-load-dir x",
        "--logits-save-dir x",
    ),
    r"^--use-mup: .*without it": ("--use-mup",),
    r"^--fp8-format.*local modules": (),  # a rehearsal leaves them out: test_fp8
    r"^--fp8-format.*not installed": (),
    r"^--fp8-param-gather: .*leave it out": ("--fp8-param-gather",),
    r"^--dataloader-type external: .*leave it out": ("--dataloader-type external",),
    r"^--ckpt-convert-format: .*leave it out": ("--ckpt-convert-format torch_dist",),
    r"^--config-logger-dir: .*leave it out": ("--config-logger-dir x",),
    r"^--ddp-average-in-collective: .*leave it out": ("--ddp-average-in-collective",),
    r"^--ckpt-format: .*leave it out": ("--ckpt-format torch",),
    r"^--non-persistent-ckpt-type local, in_memory: .*use global": ("--non-persistent-ckpt-type local",),
    r"^--rampup-batch-size: .*--train-samples": ("--rampup-batch-size 2 2 10",),
    r"^--train-samples with --train-iters: .*leave the other out": ("--train-samples 80",),
    r"^--step-batch-size-schedule with --train-iters: .*--train-samples": ("--step-batch-size-schedule 0:8",),
    r"^--fp4-format: .*use --fp8-format": ("--fp4-format e2m1",),
    r"^--transformer-impl transformer_engine": (),  # not in a rehearsal: test_without_transformer_engine
    r"^--optimizer-cuda-graph: .*leave it out": ("--optimizer-cuda-graph",),
    r"^--fp8-output-proj: .*leave it out": ("--fp8-output-proj",),
    r"^a soft-capped": (),  # 0.19.2 has no flag for it: test_soft_capped_student
    r"^--hybrid-layer-pattern: .*GPT-style": ("--hybrid-layer-pattern M*",),
    r"^--fp16: .*use --bf16": ("--fp16", "--pipeline-model-parallel-size 2 --fp16"),
    r"^--dataloader-inter-document-masking with --context-parallel-size.*one of the two": (
        "--context-parallel-size 2 --dataloader-inter-document-masking",
    ),
}


def test_refused(toy: Toys) -> None:
    """Every row is refused in the run and in the dry run, one after the other on one rank."""
    lines = [(pattern, flags.split()) for pattern, lines in COMMANDS.items() for flags in lines]
    both = [(pattern, [*flags, *dry]) for pattern, flags in lines for dry in ([], ["--fdd-dry-run"])]
    endings = run(*[toy.command(*flags) for _, flags in both], ranks=1)
    assert len(endings) == 2 * len(lines) > 30
    for (pattern, _), ending in zip(both, endings, strict=True):
        assert_refused(ending, pattern.replace("^", "error: "))


@pytest.mark.parametrize("flags", ["--use-mup", "--fp16 --fdd-dry-run"])
def test_refused_on_every_rank(flags: str, toy: Toys) -> None:
    [endings] = run(toy.command(*flags.split()))
    assert_refused(endings, flags.split()[0])


def test_every_refusal_is_tested() -> None:
    told = [[pattern for pattern in COMMANDS if re.search(pattern, message)] for _, message in REFUSALS]
    assert told == [[pattern] for pattern in COMMANDS], "in the order of REFUSALS, each by one pattern"


class Unset(argparse.Namespace):
    """Arguments without any value."""

    def __getattr__(self, name: str) -> None:
        return None


def refuse(args: argparse.Namespace) -> None:
    check_refusals(Context(FddConfig(teacher_load="T"), args))


@pytest.mark.parametrize("flag", ["fp8", "teacher_fp8_format"])
def test_fp8(flag: str) -> None:
    """Without TransformerEngine, Megatron accepts the flag and computes in bf16."""
    with pytest.raises(ValueError, match="use --transformer-impl transformer_engine"):
        refuse(Unset(**{flag: "hybrid"}, transformer_impl="local"))
    assert importlib.util.find_spec("transformer_engine") is None, "this test is for machines without it"
    with pytest.raises(ValueError, match="TransformerEngine is not installed"):
        refuse(Unset(**{flag: "hybrid"}, transformer_impl="transformer_engine"))


def test_soft_capped_student() -> None:
    with pytest.raises(ValueError, match="soft-capped head"):
        refuse(Unset(final_logit_softcapping=30.0))


RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 2".split()


def test_recompute_that_hides_a_tap(toy: Toys) -> None:
    hiding = toy.command(*RECOMPUTE, "--fdd-layer-pairs", "1:2,2:4")
    for endings in run(hiding, [*hiding, "--fdd-dry-run"]):
        assert_refused(
            endings, r"--recompute-num-layers 2 hides the tapped blocks \[1\].*--recompute-method block"
        )


def test_recompute_that_hides_none(toy: Toys) -> None:
    [endings] = run(toy.command(*RECOMPUTE, "--fdd-layer-pairs", "2:2,4:4", "--train-iters", "1"))
    assert [ending.status for ending in endings] == [0, 0]


def in_delayed_scaling(args: argparse.Namespace) -> bool:
    """Whether a teacher runs with delayed scaling; here always, because a rehearsal itself has no FP8."""
    return True


def test_a_converted_teacher_has_no_scales(toy: Toys) -> None:
    patch = Patch("megatron_fdd.plan.fp8_scales", "uses_delayed_scaling", in_delayed_scaling)
    for endings in run(toy.command(), toy.command("--fdd-dry-run"), patches=[patch]):
        assert_refused(
            endings, r"--teacher-fp8-recipe delayed: .*teacher/release holds no scales .*use tensorwise"
        )


def test_without_transformer_engine() -> None:
    """Megatron's default modules are TransformerEngine's; a plan needs none of them."""
    for given in ("transformer_engine", "inference_optimized"):
        with pytest.raises(ValueError, match="default.*not installed.*--transformer-impl local"):
            refuse(Unset(transformer_impl=given))
        refuse(Unset(transformer_impl=given, fdd_dry_run=True, context_parallel_size=1))
    refuse(Unset(transformer_impl="local", context_parallel_size=1))
