"""Whole runs with TransformerEngine's modules and optimizer, and in FP8, on CPUs; see `tests/transformer_engine`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.models.gpt import GPTModel

from megatron_fdd import convert
from megatron_fdd.step.teacher.loading import build_teacher
from tests.convert.toys import tensor_hashes
from tests.entry import damage
from tests.entry.checks import assert_refused
from tests.entry.command import Patch, read_metrics, run, trained, without_seconds
from tests.entry.conftest import SCRATCH, STUDENT, TEACHER, Toys, make_checkpoint
from tests.harness.ranks import Layout, run_on_ranks
from tests.transformer_engine import IMAGE, needs_python

pytestmark = needs_python

LOCAL, TE = "--transformer-impl local", "--transformer-impl transformer_engine"
STEPS = "--train-iters 4 --save-interval 2 --use-distributed-optimizer"
FP8 = {
    "tensorwise": "--fp8-format hybrid --fp8-recipe tensorwise --teacher-fp8-format e4m3",
    "delayed": "--fp8-format hybrid --teacher-fp8-format hybrid --fp8-amax-history-len 4 --fp8-amax-compute-algo max",
    "blockwise": "--fp8-format e4m3 --fp8-recipe blockwise --teacher-fp8-format e4m3 --teacher-fp8-recipe blockwise",
    "mxfp8": "--fp8-format hybrid --fp8-recipe mxfp8 --teacher-fp8-format e4m3 --teacher-fp8-recipe mxfp8",
    "teacher": "--teacher-fp8-format hybrid",
}
# Without it TransformerEngine does not load the scales of delayed scaling, which are pickled.
TRUSTED = {"NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE": "1"}
FULL = "--recompute-granularity full --recompute-method block --recompute-num-layers 4"
LAYOUTS = {
    "dp2": "",
    "tp2-sp": "--tensor-model-parallel-size 2 --sequence-parallel",
    "pp2": "--pipeline-model-parallel-size 2",
    "full-block": FULL,
}


# Widths that FP8 takes; except for MXFP8, their halves fit too.
FITTING = {
    "teacher": TEACHER
    | {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
    },
    "student": STUDENT | {"intermediate_size": 64},
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, toy: Toys) -> Toys:
    """Make models for FP8, with the text of the others."""
    found = Toys(tmp_path_factory.mktemp("fp8"))
    for name, changes in FITTING.items():
        arguments = {"root": found.root, "name": name, "changes": changes}
        run_on_ranks(make_checkpoint, Layout(ranks=1), arguments)
    for part in ("text.bin", "text.idx"):
        (found.root / part).symlink_to(toy.root / part)
    return found


def command(toy: Toys, folder: Path, *more: str) -> list[str]:
    """Return one command for the first start and for every resumption."""
    places = ["--load", folder, "--save", folder, "--pretrained-checkpoint", toy.student]
    places += ["--fdd-metrics-file", folder / "metrics.jsonl"]
    return toy.command(*STEPS.split(), *places, *" ".join(more).split())


def metrics(folder: Path) -> list[dict]:
    return without_seconds(read_metrics(folder / "metrics.jsonl"))


def assert_near(folder: Path, other: Path, relative: float) -> None:
    ours, wanted = metrics(folder), metrics(other)
    assert [record["iteration"] for record in ours] == [record["iteration"] for record in wanted]
    for record, expected in zip(ours, wanted, strict=True):
        assert record == pytest.approx(expected, rel=relative, abs=relative)


@pytest.fixture(scope="module")
def local(toy: Toys, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run in float32 with Megatron's local modules."""
    folder = tmp_path_factory.mktemp("local")
    trained(command(toy, folder, LOCAL))
    return folder


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "tp2-sp" else pytest.mark.tier("all")) for name in LAYOUTS],
)
def test_gives_the_numbers_of_the_local_modules(name: str, toy: Toys, local: Path, tmp_path: Path) -> None:
    trained(command(toy, tmp_path, TE, LAYOUTS[name]), image=IMAGE)
    assert_near(tmp_path, local, 2e-5)


def test_goes_on_where_the_other_modules_stopped(toy: Toys, local: Path, tmp_path: Path) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    trained(command(toy, there, LOCAL, "--exit-interval 2"))
    trained(command(toy, there, TE), command(toy, back, TE, "--exit-interval 2"), image=IMAGE)
    trained(command(toy, back, LOCAL))
    assert_near(there, local, 2e-5)
    assert_near(back, local, 2e-5)


@pytest.mark.parametrize(
    "name",  # a test below has mxfp8
    [
        pytest.param(name, marks=() if name == "blockwise" else pytest.mark.tier("all"))
        for name in FP8
        if name != "mxfp8"
    ],
)
def test_fp8_resumes_bit_for_bit_and_converts(name: str, toy: Toys, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    flags = f"{TE} --bf16 {FP8[name]} {FULL} --fdd-tap-dtype fp8"
    starts = trained(
        command(toy, whole, flags), command(toy, stopped, flags, "--exit-interval 2"), image=IMAGE
    )
    is_warned = "to go on from a checkpoint of this run set NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE=1"
    assert [is_warned in ending.err for ending in starts[0]] == [name == "delayed", False]
    trust = TRUSTED if name == "delayed" else None
    if trust:
        [endings] = run(command(toy, stopped, flags), image=IMAGE)
        assert [ending.status for ending in endings] == [1, 1]
        assert "set NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE=1" in endings[0].err
    trained(command(toy, stopped, flags), image=IMAGE, environment=trust)
    assert [record["iteration"] for record in metrics(whole)] == [1, 2, 3, 4]
    assert metrics(stopped) == metrics(whole)
    for folder in (whole, stopped):
        convert.mcore_to_hf(folder, folder / "converted")
    assert tensor_hashes(whole / "converted") == tensor_hashes(stopped / "converted")


@pytest.mark.tier("all")
@pytest.mark.parametrize("name", ["tensorwise", "blockwise"])
def test_an_evaluation_between_steps_changes_no_step(name: str, toy: Toys, tmp_path: Path) -> None:
    """A student's weights are copied into FP8 again. (Delayed scaling remembers the evaluation.)"""
    plain, evaluated = tmp_path / "plain", tmp_path / "evaluated"
    flags = f"{TE} --bf16 {FP8[name]} {FULL}"
    trained(
        command(toy, plain, flags),
        command(toy, evaluated, flags, "--eval-interval 1 --eval-iters 1"),
        image=IMAGE,
    )
    steps = [record for record in metrics(evaluated) if "tokens" in record]
    assert len(metrics(evaluated)) > len(steps) == 4
    assert steps == metrics(plain)


def build_in_fp8(*arguments: Any) -> GPTModel:
    """Build as `build_teacher` does, in FP8."""
    model = build_teacher(*arguments)
    matrices = [weight for weight in model.decoder.layers.parameters() if weight.dim() > 1]
    assert matrices
    assert all(is_float8tensor(weight) for weight in matrices)
    return model


@pytest.fixture(scope="module")
def in_bf16(toy: Toys, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folders of runs in bf16, by layout."""
    folders = {layout: tmp_path_factory.mktemp(f"bf16-{layout}") for layout in ("tp2-sp", "pp2")}
    trained(
        *[command(toy, folder, TE, "--bf16", LAYOUTS[layout]) for layout, folder in folders.items()],
        image=IMAGE,
    )
    return folders


@pytest.mark.tier("all")
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("tensorwise", "tp2-sp"),
        ("delayed", "pp2"),
        ("blockwise", "pp2"),
        ("mxfp8", "pp2"),
        ("teacher", "tp2-sp"),
    ],
)
def test_fp8_learns_as_bf16_does_with_no_bf16_beside_the_teachers_weights(
    name: str, layout: str, toy: Toys, in_bf16: dict[str, Path], tmp_path: Path
) -> None:
    built = Patch("megatron_fdd.distill", "build_teacher", build_in_fp8)
    flags = f"{TE} --bf16 {LAYOUTS[layout]}"
    trained(command(toy, tmp_path, flags, FP8[name]), image=IMAGE, patches=[built])
    assert_near(tmp_path, in_bf16[layout], 0.1)
    assert metrics(tmp_path)[0]["kd"] != metrics(in_bf16[layout])[0]["kd"]


def test_a_broken_teacher_is_refused_whatever_rounding_makes_of_it(toy: Toys, tmp_path: Path) -> None:
    """In FP8, infinity would become a number."""
    name = "model.layers.2.mlp.down_proj.weight"
    broken = damage.with_tensor(toy.root / "teacher-hf", tmp_path / "broken", name, float("inf"))
    flags = f"{TE} --bf16 {FP8['teacher']} --teacher-load {broken}"
    [endings] = run(command(toy, tmp_path / "run", flags), image=IMAGE)
    assert_refused(endings, r"Not finite: decoder\.layers\.2\.mlp\.linear_fc2\.weight\. Convert it again")


@pytest.mark.parametrize(
    ("name", "support", "whose"),
    [
        ("tensorwise", "_FP8_SUPPORT", "recipe tensorwise for the student"),
        ("teacher", "_FP8_SUPPORT", "recipe tensorwise for the teacher"),
        ("blockwise", "_FP8_BLOCK_SCALING_SUPPORT", "recipe blockwise for the student"),
        ("mxfp8", "_MXFP8_SUPPORT", "recipe mxfp8 for the student"),
    ],
)
def test_a_gpu_that_does_not_multiply_fp8(
    name: str, support: str, whose: str, toy: Toys, tmp_path: Path
) -> None:
    lacks = Patch("transformer_engine.pytorch.quantization", support, (False, "An older GPU."))
    words = command(toy, tmp_path, f"{TE} --bf16 {FP8[name]}")
    refused, planned = run(words, [*words, "--fdd-dry-run"], image=IMAGE, patches=[lacks])
    flag = "--teacher-fp8-format" if name == "teacher" else "--fp8-format"
    assert_refused(refused, rf"FP8 with {whose}: An older GPU\. Use another recipe, or leave {flag} out")
    assert [ending.status for ending in planned] == [0, 0]


EXPERTS = (
    "--ffn-hidden-size 64 --num-experts 4 --moe-ffn-hidden-size 32 --moe-grouped-gemm --moe-router-topk 2 "
    "--moe-token-dispatcher-type alltoall --moe-aux-loss-coeff 0.1 --expert-model-parallel-size 2"
)


@pytest.mark.tier("all")
def test_experts_in_mxfp8_resume_bit_for_bit(toy: Toys, tmp_path: Path) -> None:
    """The student starts from scratch, and its experts are multiplied together."""
    words = [word for word in toy.command(*SCRATCH) if word != "--use-checkpoint-args"]
    words += f"{STEPS} {TE} --bf16 {FP8['mxfp8']} {EXPERTS}".split()
    folders = tmp_path / "whole", tmp_path / "stopped"
    whole, stopped = (
        [
            *words,
            "--load",
            str(folder),
            "--save",
            str(folder),
            "--fdd-metrics-file",
            str(folder / "metrics.jsonl"),
        ]
        for folder in folders
    )
    trained(whole, [*stopped, "--exit-interval", "2"], image=IMAGE)
    trained(stopped, image=IMAGE)
    assert [record["iteration"] for record in metrics(folders[0])] == [1, 2, 3, 4]
    assert metrics(folders[1]) == metrics(folders[0])
