"""A teacher in FP8 with delayed scaling: it runs with its checkpoint's scales, and they stay as they are.

The checkpoint is made as Megatron makes it: by training a model with TransformerEngine's modules, at TP 2.
"""

from __future__ import annotations

from argparse import Namespace
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_fdd.data.batch import get_batch
from megatron_fdd.teacher import loading
from megatron_fdd.teacher.live import LiveTeacher
from megatron_fdd.teacher.scales import check_scales, fp8_linears
from megatron_fdd.topology import Topology
from tests.harness.ranks import Layout, run_on_ranks
from tests.oracle.case import FULL_BLOCK, FULL_UNIFORM, Case, case_batches, join, relative, schedule_step
from tests.oracle.models import build_student
from tests.oracle.reference import random_weights
from tests.transformer_engine import IMAGE, needs_python
from tests.transformer_engine.delayed import (
    CASE,
    DELAYED,
    ORDER_TOLERANCE,
    TRUST,
    WRONG,
    load,
    save,
    trusted,
)

pytestmark = needs_python

TAPS = (2, 7)


def trained_model(options: tuple, num_steps: int) -> GPTModel:
    """On every rank: the teacher's architecture after steps of plain training; after none it has run once."""
    topology = Topology.from_megatron(sequence_parallel=False)
    chunks = build_student(
        CASE.teacher, random_weights(CASE.teacher, 2), topology, torch.float32,
        transformer_impl="transformer_engine", **dict(options),
    )  # fmt: skip
    batches = case_batches(CASE)
    for batch in batches[:num_steps]:
        chunks[0].zero_grad_buffer()
        unwrap_model(chunks)[0].set_is_first_microbatch()  # new weights, to be put in FP8 again
        chunks[0](batch["tokens"], batch["position_ids"], None, labels=batch["labels"]).mean().backward()
        step(chunks, 0.1)
    model = unwrap_model(chunks)[0].eval()
    model.set_is_first_microbatch()
    features(model, CASE)
    return model


def step(chunks: list[torch.nn.Module], rate: float) -> None:
    """Plain gradient descent."""
    with torch.no_grad():
        for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
            parameter.sub_(rate * parameter.main_grad)


def features(model: GPTModel, case: Case) -> list[Tensor]:
    """On every rank, without a pipeline: hidden states of a batch that nobody has trained on."""
    batch = get_batch(iter(case_batches(case)[-1:]), "cpu")
    found = LiveTeacher(model, TAPS).features(0, batch)
    return [found.final_SBT, *found.taps_SBT.values()]


def make_checkpoints(folder: Path) -> list[Tensor]:
    """Body on every rank: one that carries scales and what is none; features of the first one's model."""
    model = trained_model(DELAYED, 3)
    save(model, folder / "scaled")
    save(model, folder / "converted", extra_state=False)
    save(trained_model((), 0), folder / "empty")
    save(trained_model(DELAYED, 0), folder / "ones")  # no step updated what it starts with
    return features(model, CASE)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Tensor]]:
    folder = tmp_path_factory.mktemp("delayed")
    return folder, run_on_ranks(make_checkpoints, Layout(tp=2), {"folder": folder}, image=IMAGE)[0]


def loaded_features(case: Case, checkpoint: Path) -> list[Tensor]:
    """Body on every rank."""
    with trusted():
        model = load(
            case, Topology.from_megatron(sequence_parallel=case.sequence_parallel), checkpoint=checkpoint
        )
    return features(model, case)


@pytest.mark.parametrize("tp", [1, 2])
def test_features_are_those_of_the_trained_model(tp: int, made: tuple[Path, list[Tensor]]) -> None:
    folder, wanted = made
    case = replace(CASE, tp=tp)
    arguments = {"case": case, "checkpoint": folder / "scaled"}
    for found in run_on_ranks(loaded_features, case.layout, arguments, image=IMAGE):
        errors = [relative(mine - theirs, theirs) for mine, theirs in zip(found, wanted, strict=True)]
        assert max(errors) <= (0 if tp == 2 else ORDER_TOLERANCE)


def unscaled_features(checkpoint: Path) -> list[Tensor]:
    """Body on every rank: what would come of scales that stay 1."""
    with patch.object(loading, "uses_delayed_scaling", lambda _args: False):
        return loaded_features(replace(CASE, tp=2), checkpoint)


def test_with_scale_1_they_would_not_be(made: tuple[Path, list[Tensor]]) -> None:
    folder, wanted = made
    arguments = {"checkpoint": folder / "scaled"}
    for found in run_on_ranks(unscaled_features, Layout(tp=2), arguments, image=IMAGE):
        errors = [relative(mine - theirs, theirs) for mine, theirs in zip(found, wanted, strict=True)]
        assert min(errors) > WRONG


def scales(model: torch.nn.Module) -> dict[str, Tensor]:
    """All that delayed scaling keeps between steps, for every linear."""
    return {
        f"{name} {way} {what}": getattr(module.fp8_meta[way], what).clone()
        for name, module in fp8_linears(model)
        for way in ("scaling_fwd", "scaling_bwd")
        for what in ("scale", "amax_history")
    }


def train_beside(case: Case, checkpoint: Path) -> tuple[list[str], list[str], dict[str, float]]:
    """Body on every rank: the teacher's scales that three steps change, the student's; the first step's means."""
    with trusted():
        chunks, teacher, steps = join(case, make_teacher=partial(load, checkpoint=checkpoint))
    student, first = unwrap_model(chunks)[0], {}
    before, changed = scales(teacher), []
    for index in range(3):
        means = schedule_step(case, chunks, steps)
        step(chunks, 1e-3)
        first = first or {name: value.item() for name, value in (means[0] if means else {}).items()}
        if index == 0 and dict(case.student_options)["fp8_recipe"] == "delayed":
            changed = [name for name, value in scales(student).items() if bool((value != 1).any())]
    after = scales(teacher)
    assert before.keys() == after.keys()
    assert before
    return [name for name in before if not torch.equal(before[name], after[name])], changed, first


TENSORWISE = (("fp8", "hybrid"), ("fp8_recipe", "tensorwise"))
RUNS = {
    "plain": CASE,
    "full-block": replace(CASE, recompute=FULL_BLOCK),
    "full-uniform": replace(CASE, recompute=FULL_UNIFORM),
    "pp2": replace(CASE, pp=2),
    "pp2-full-uniform": replace(CASE, pp=2, recompute=FULL_UNIFORM),
    "tp2-sp": replace(CASE, tp=2, sequence_parallel=True),
    "student-tensorwise": replace(CASE, student_options=TENSORWISE),
}


@pytest.fixture(scope="module")
def wanted_means(made: tuple[Path, list[Tensor]]) -> dict[str, float]:
    """Without a pipeline, where the teacher's features are the trained model's."""
    arguments = {"case": CASE, "checkpoint": made[0] / "scaled"}
    return run_on_ranks(train_beside, CASE.layout, arguments, image=IMAGE)[0][2]


@pytest.mark.parametrize("name", RUNS)
def test_a_students_steps_leave_the_scales_alone(
    name: str, made: tuple[Path, list[Tensor]], wanted_means: dict[str, float]
) -> None:
    case = RUNS[name]
    arguments = {"case": case, "checkpoint": made[0] / "scaled"}
    results = run_on_ranks(train_beside, case.layout, arguments, image=IMAGE)
    for changed, students, means in results:
        assert changed == []
        assert bool(students) == (name != "student-tensorwise")
        if students and means:
            assert means == pytest.approx(wanted_means, rel=1e-4)
    assert results[-1][2]  # of the last stage


def refused(case: Case, checkpoint: Path) -> None:
    """Body on every rank."""
    with (
        trusted(),
        pytest.raises(ValueError, match=r"no scales of delayed scaling for decoder\.layers.* and \d+ more"),
    ):
        load(case, Topology.from_megatron(sequence_parallel=False), checkpoint=checkpoint)


@pytest.mark.parametrize("kind", ["converted", "empty", "ones"])
@pytest.mark.parametrize("pp", [1, 2])
def test_layers_without_scales_are_refused(kind: str, pp: int, made: tuple[Path, list[Tensor]]) -> None:
    case = replace(CASE, pp=pp)
    run_on_ranks(refused, case.layout, {"case": case, "checkpoint": made[0] / kind}, image=IMAGE)


# A checkpoint's arguments, and the teacher's where nothing is changed.
STORED = Namespace(
    fp8="hybrid", fp8_recipe="delayed", num_experts=8, moe_grouped_gemm=True, expert_model_parallel_size=2
)


@pytest.mark.parametrize("kind", ["converted", "empty"])
def test_a_checkpoint_without_scales_is_refused_unloaded(kind: str, made: tuple[Path, list[Tensor]]) -> None:
    with trusted(), pytest.raises(ValueError, match="holds no scales .* use tensorwise, blockwise or mxfp8"):
        check_scales(made[0] / kind, STORED, STORED)


def test_scales_are_read_from_trusted_checkpoints_alone(made: tuple[Path, list[Tensor]]) -> None:
    with trusted():
        check_scales(made[0] / "scaled", STORED, STORED)
    with trusted("0"), pytest.raises(ValueError, match=f"if you trust the checkpoint, set {TRUST}=1"):
        check_scales(made[0] / "scaled", STORED, STORED)


@pytest.mark.parametrize(
    ("teacher", "is_refused"),
    [
        ({"expert_model_parallel_size": 4}, True),
        ({"expert_model_parallel_size": 4, "moe_grouped_gemm": False}, False),
        ({"expert_model_parallel_size": 1, "num_experts": None}, False),
    ],
)
def test_scales_of_grouped_experts_want_as_many_to_a_rank(
    teacher: dict, is_refused: bool, made: tuple[Path, list[Tensor]]
) -> None:
    changed = Namespace(**{**vars(STORED), **teacher})
    message = (
        "with expert-parallel size 2; at 4 .* use --fdd-teacher-expert-model-parallel-size 2, or the rec"
    )
    with trusted(), pytest.raises(ValueError, match=message) if is_refused else nullcontext():
        check_scales(made[0] / "scaled", STORED, changed)


def loads_untrusted(case: Case, checkpoint: Path) -> bool:
    """Body on every rank: does a teacher that needs no scales leave them unread?"""
    model = load(case, Topology.from_megatron(sequence_parallel=False), checkpoint=checkpoint)
    kept = [module.fp8_meta.get("scaling_fwd") for _, module in fp8_linears(model)]
    return not any(hasattr(each, "amax_history") for each in kept)


@pytest.mark.parametrize("options", [(), TENSORWISE], ids=["bf16", "tensorwise"])
def test_other_recipes_do_not_read_them(options: tuple, made: tuple[Path, list[Tensor]]) -> None:
    case = replace(CASE, teacher_options=options)
    assert run_on_ranks(
        loads_untrusted, Layout(), {"case": case, "checkpoint": made[0] / "scaled"}, image=IMAGE
    ) == [True]
