"""Everything that would silently distil nothing, or something else, is refused in the run and in the dry run."""

from __future__ import annotations

import argparse
import importlib.util

import pytest

from megatron_fdd.arguments import REFUSALS, refuse
from tests.entry.checks import assert_refused
from tests.entry.command import Patch, run
from tests.entry.conftest import Toys

# By the place in REFUSALS: command lines that it applies to, and what the message must say.
COMMANDS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("--mtp-num-layers 1",), r"--mtp-num-layers: .*without it"),
    (("--overlap-moe-expert-parallel-comm",), r"--overlap-moe-expert-parallel-comm: .*leave it out"),
    (("--cuda-graph-impl full_iteration",), r"--cuda-graph-impl full_iteration: .*use local"),
    (("--moe-expert-rank-capacity-factor 1.5",), r"--moe-expert-rank-capacity-factor: .*leave it out"),
    (("--use-megatron-fsdp", "--use-torch-fsdp2"), r"--use-megatron-fsdp.*use --use-distributed-optimizer"),
    (("--defer-embedding-wgrad-compute",), r"--defer-embedding-wgrad-compute: .*leave it out"),
    (("--hybrid-context-parallel",), r"--hybrid-context-parallel: .*leave it out"),
    (
        ("--logits-load-dir x", "--logits-save-dir x"),
        r"--logits-load-dir, --logits-save-dir: .*without --teacher-load",
    ),
    (("--use-mup",), r"--use-mup: .*without it"),
    ((), r"--fp8-format"),  # a rehearsal leaves them out: test_fp8
    ((), r"--fp8-format"),
    (("--fp8-param-gather",), r"--fp8-param-gather: .*leave it out"),
    (("--fp4-format e2m1",), r"--fp4-format: .*use --fp8-format"),
    ((), r"--transformer-impl transformer_engine"),  # not in a rehearsal: test_without_transformer_engine
    (("--optimizer-cuda-graph",), r"--optimizer-cuda-graph: .*leave it out"),
    (("--fp8-output-proj",), r"--fp8-output-proj: .*leave it out"),
    ((), r"soft-capped"),  # 0.19.2 has no flag for it: test_soft_capped_student
    (("--hybrid-layer-pattern M*",), r"--hybrid-layer-pattern: .*GPT-style"),
    (
        ("--fp16", "--pipeline-model-parallel-size 2 --fp16"),
        r"--fp16: .*use --bf16",
    ),
    (
        ("--context-parallel-size 2 --dataloader-inter-document-masking",),
        r"--dataloader-inter-document-masking with --context-parallel-size.*one of the two",
    ),
)
FLAT = [(flags, pattern) for commands, pattern in COMMANDS for flags in commands]


@pytest.mark.parametrize(("flags", "pattern"), FLAT)
def test_refused(flags: str, pattern: str, toy: Toys) -> None:
    for endings in run(toy.command(*flags.split()), toy.command(*flags.split(), "--fdd-dry-run")):
        assert_refused(endings, pattern)


def test_every_refusal_is_tested() -> None:
    assert len(COMMANDS) == len(REFUSALS)
    for (_, message), (_, pattern) in zip(REFUSALS, COMMANDS, strict=True):
        assert pattern.split(":")[0].split(".*")[0].split(" above")[0] in message


class Unset(argparse.Namespace):
    """Arguments of which nothing is set."""

    def __getattr__(self, name: str) -> None:
        return None


@pytest.mark.parametrize("flag", ["fp8", "teacher_fp8_format"])
def test_fp8(flag: str) -> None:
    """Without TransformerEngine Megatron takes the flag and computes in bf16."""
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
    """A rehearsal has no FP8; its teacher takes the place of one that has."""
    return True


def test_a_converted_teacher_has_no_scales(toy: Toys) -> None:
    patch = Patch("megatron_fdd.run", "uses_delayed_scaling", in_delayed_scaling)
    for endings in run(toy.command(), toy.command("--fdd-dry-run"), patches=[patch]):
        assert_refused(
            endings, r"--teacher-fp8-recipe delayed: .*teacher/release holds no scales .*use tensorwise"
        )


def test_without_transformer_engine() -> None:
    """Megatron's default modules are its; a plan can be made anywhere."""
    for given in ("transformer_engine", "inference_optimized"):
        with pytest.raises(ValueError, match="default.*not installed.*--transformer-impl local"):
            refuse(Unset(transformer_impl=given))
        refuse(Unset(transformer_impl=given, fdd_dry_run=True, context_parallel_size=1))
    refuse(Unset(transformer_impl="local", context_parallel_size=1))
