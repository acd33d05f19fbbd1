"""Mixtures of experts through the real entry point: as teacher of a dense student, as student, and both."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_fdd.step.teacher import loading
from tests.entry.checks import assert_refused
from tests.entry.command import Patch, read_metrics, run, trained, without_seconds
from tests.entry.conftest import SCRATCH, Toys

# The first layer is dense, and the router has no default settings, so that a forgotten field shows.
ROUTING = (
    "--num-experts 4 --moe-ffn-hidden-size 24 --moe-layer-freq [0]+[1]*3 --moe-router-topk 2 "
    "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-topk-scaling-factor 1.5 "
    "--moe-shared-expert-intermediate-size 16 --moe-shared-expert-gate "
    "--moe-router-num-groups 2 --moe-router-group-topk 1"
).split()
BALANCED = "--moe-aux-loss-coeff 0.1 --moe-token-dispatcher-type alltoall".split()
TEACHER_SIZE, STUDENT_SIZE = "--teacher-expert-model-parallel-size", "--expert-model-parallel-size"


@pytest.fixture(scope="module")
def experts(toy: Toys, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train student-shaped mixtures of experts on labels, so long that their routers prefer some experts.

    Returns the folder of two checkpoints, `teacher` and `student`.
    """
    root = tmp_path_factory.mktemp("experts")
    weights = "--fdd-alpha 0 --fdd-beta 0 --fdd-kd-weight 0 --fdd-ce-weight 1".split()
    schedule = "--train-iters 8 --lr 1e-2 --save-interval 8".split()
    words = [word for word in toy.command() if word != "--use-checkpoint-args"]
    words += [*SCRATCH, *ROUTING, *BALANCED, *weights, *schedule]
    places = [str(root / name) for name in ("teacher", "student")]
    trained(
        *[
            [*words, "--load", place, "--save", place, "--seed", str(seed)]
            for seed, place in enumerate(places, 1)
        ],
        ranks=1,
    )
    shutil.copytree(toy.tokenizer, root / "teacher" / "tokenizer", dirs_exist_ok=True)
    return root


# The models that are mixtures, the number of ranks, and the layout.
LAYOUTS = {
    "teacher-ep1-dp2": ("teacher", 2, ""),
    "teacher-ep2": ("teacher", 2, f"{TEACHER_SIZE} 2"),
    "teacher-pp2": ("teacher", 2, "--pipeline-model-parallel-size 2"),
    "teacher-tp2": ("teacher", 2, "--tensor-model-parallel-size 2"),
    "student-ep2": ("student", 2, f"{STUDENT_SIZE} 2"),
    "both-pp2-ep2-ep1": (
        "both",
        4,
        f"--pipeline-model-parallel-size 2 {STUDENT_SIZE} 2 {TEACHER_SIZE} 1 --use-distributed-optimizer",
    ),
    "both-tp2-etp1-ep2-sp": (
        "both",
        2,
        f"--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1 {STUDENT_SIZE} 2",
    ),
    "both-tp2-ep2-sp": (
        "both",
        4,
        f"--tensor-model-parallel-size 2 --sequence-parallel {STUDENT_SIZE} 2",
    ),
}


def command(toy: Toys, experts: Path, who: str, *more: object) -> list[str]:
    """Return the command of a run in which teacher, student or both are the mixture."""
    flags: list[object] = []
    if who != "student":
        flags += ["--teacher-load", experts / "teacher"]
    if who != "teacher":
        flags += ["--load", experts / "student", "--finetune", *BALANCED]
    return toy.command(*flags, *more)


def metrics(path: Path) -> list[dict[str, Any]]:
    return without_seconds(read_metrics(path))


@pytest.fixture(scope="module")
def on_one_rank(
    toy: Toys, experts: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    """Return the metrics of each kind of run on one rank."""
    folder = tmp_path_factory.mktemp("one-rank")
    kinds = ("teacher", "student", "both")
    trained(
        *[command(toy, experts, who, "--fdd-metrics-file", folder / f"{who}.jsonl") for who in kinds], ranks=1
    )
    return {who: metrics(folder / f"{who}.jsonl") for who in kinds}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_metrics_file_does_not_depend_on_the_layout(
    name: str, toy: Toys, experts: Path, on_one_rank: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    who, ranks, flags = LAYOUTS[name]
    path = tmp_path / "metrics.jsonl"
    trained(command(toy, experts, who, *flags.split(), "--fdd-metrics-file", path), ranks=ranks)
    assert len(on_one_rank[who]) == 3
    for record, wanted in zip(metrics(path), on_one_rank[who], strict=True):
        assert record == pytest.approx(wanted, rel=1e-5, abs=1e-6)


@pytest.mark.tier("all")
def test_resumes_with_its_experts_spread_otherwise(toy: Toys, experts: Path, tmp_path: Path) -> None:
    whole, moved, folder = tmp_path / "whole.jsonl", tmp_path / "moved.jsonl", tmp_path / "moved"
    flags = ("--train-iters", "4", "--use-distributed-optimizer", "--save-interval", "2", *BALANCED)
    start = ("--pretrained-checkpoint", experts / "student", "--load", folder, "--save", folder)
    resumed = toy.command(*flags, *start, "--fdd-metrics-file", moved)
    trained(
        toy.command(*flags, "--load", experts / "student", "--finetune", "--fdd-metrics-file", whole),
        [*resumed, STUDENT_SIZE, "2", "--exit-interval", "2"],
        [*resumed, STUDENT_SIZE, "4"],
        ranks=4,
    )
    assert len(metrics(moved)) == 4
    for record, wanted in zip(metrics(moved), metrics(whole), strict=True):
        assert record == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    for endings in run(resumed, [*resumed, "--fdd-dry-run"], ranks=2):
        assert_refused(
            endings, rf"saved with {STUDENT_SIZE} 4, this run has 1: .*of at least 2, .*--finetune"
        )


def test_nothing_of_the_architecture_is_forgotten(toy: Toys, experts: Path, tmp_path: Path) -> None:
    """Before its first step, the student equals its teacher."""
    path = tmp_path / "metrics.jsonl"
    itself = ("--load", experts / "teacher", "--train-iters", 1, "--fdd-metrics-file", path)
    trained(command(toy, experts, "both", *itself), ranks=1)
    [record] = metrics(path)
    assert [record[name] for name in ("kd", "trajectory", "delta")] == pytest.approx([0, 0, 0], abs=1e-6)


def balancing_losses(out: str) -> list[str]:
    """Return the router's losses in Megatron's log."""
    return re.findall(r"load_balancing_loss: (\S+)", out)


def test_the_teacher_adds_nothing_to_the_balancing_loss(toy: Toys, experts: Path) -> None:
    step = ("--train-iters", "1")
    [[dense], [mixture], [student]] = trained(
        *[command(toy, experts, who, *step) for who in ("teacher", "both", "student")], ranks=1
    )
    assert not balancing_losses(dense.out)
    assert len(balancing_losses(student.out)) == 1
    assert float(balancing_losses(student.out)[0]) > 0
    assert balancing_losses(mixture.out) == balancing_losses(student.out)


WRONG = {
    "experts for a dense student": (
        "neither",
        f"{STUDENT_SIZE} 2",
        rf"{STUDENT_SIZE} 2: the student has no experts: .*{TEACHER_SIZE}",
    ),
    "experts for a dense teacher": (
        "neither",
        f"{TEACHER_SIZE} 2",
        rf"{TEACHER_SIZE} 2: the teacher has no experts: leave it out",
    ),
    "size zero": ("teacher", f"{TEACHER_SIZE} 0", rf"{TEACHER_SIZE} 0: must be at least 1"),
    "teacher does not divide": ("teacher", f"{TEACHER_SIZE} 3", r"3 does not divide the teacher's 4 experts"),
    "teacher beyond the ranks": (
        "teacher",
        f"{TEACHER_SIZE} 4",
        r"4 x expert tensor parallel 1 does not divide the 2 rank\(s\) of a pipeline stage",
    ),
    "teacher beyond a stage": (
        "teacher",
        f"{TEACHER_SIZE} 2 --pipeline-model-parallel-size 2",
        r"does not divide the 1 rank\(s\) of a pipeline stage \(of 2 rank\(s\) in 2 stage\(s\)\)",
    ),
    "student does not divide": ("student", f"{STUDENT_SIZE} 3", r"3 does not divide the student's 4 experts"),
    "student beyond the ranks": ("student", f"{STUDENT_SIZE} 4", rf"{STUDENT_SIZE} 4: 4 x .*more ranks"),
    "student's default for the teacher": (
        "both",
        f"{STUDENT_SIZE} 4 {TEACHER_SIZE} 1",
        rf"{STUDENT_SIZE} 4: 4 x .*more ranks",
    ),
    "tensor without sequence parallel": (
        "student",
        "--tensor-model-parallel-size 2",
        r"--num-experts with --tensor-model-parallel-size 2: .*--sequence-parallel",
    ),
    "other routing than the checkpoint": (
        "student",
        "--moe-router-topk 3",
        r"moe_router_topk is 3 here and 2 there",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_refused(name: str, toy: Toys, experts: Path) -> None:
    who, flags, pattern = WRONG[name]
    words = toy.command() if who == "neither" else command(toy, experts, who)
    for endings in run([*words, *flags.split()], [*words, *flags.split(), "--fdd-dry-run"]):
        assert_refused(endings, pattern)


def test_the_plan_counts_the_experts_of_a_rank(toy: Toys, experts: Path) -> None:
    flags = (*BALANCED, "--fdd-dry-run", TEACHER_SIZE)
    [[one, _], [two, _]] = trained(
        *[command(toy, experts, "teacher", *flags, size) for size in ("1", "2")], ranks=2
    )
    assert "experts of the teacher: 4 in each of 3 layer(s), 2 to a token; 4 on a rank" in one.out
    assert "experts of the teacher: 4 in each of 3 layer(s), 2 to a token; 2 on a rank" in two.out


load_whole = loading.load_weights


def load_without_an_expert(model: GPTModel, *arguments: Any, **keywords: Any) -> dict[str, Tensor]:
    """Load weights as `load_weights` does, and empty one expert that only the last rank holds."""
    weights = load_whole(model, *arguments, **keywords)
    assert len(model.decoder.layers[2].mlp.experts.local_experts) == 2  # of 4, on two ranks
    if dist.get_rank() == dist.get_world_size() - 1:
        weights["decoder.layers.2.mlp.experts.local_experts.1.linear_fc2.weight"].zero_()
    return weights


def test_an_empty_expert_on_another_rank_stops_all(toy: Toys, experts: Path) -> None:
    patch = Patch(loading.__name__, "load_weights", load_without_an_expert)
    [endings] = run(command(toy, experts, "teacher", TEACHER_SIZE, "2"), patches=[patch])
    assert_refused(
        endings, r"cannot teach.*all zero: decoder\.layers\.2\.mlp\.experts\.local_experts\.1\.linear_fc2"
    )
