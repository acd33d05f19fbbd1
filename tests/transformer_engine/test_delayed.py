"""A teacher in FP8 with delayed scaling: it runs with its checkpoint's scales, which do not change.

The checkpoint is made like Megatron's, by training a model with TransformerEngine's modules at TP 2.
"""

from __future__ import annotations

from argparse import Namespace
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
from torch import Tensor

from megatron_fdd.host.role import Role
from megatron_fdd.host.topology import Topology
from megatron_fdd.plan.context import Model, StoredModel
from megatron_fdd.plan.fp8_scales import check_teacher_scales
from megatron_fdd.step.teacher import loading
from megatron_fdd.step.teacher.scales import fp8_linears
from tests.harness.ranks import Layout, run_on_ranks
from tests.oracle.case import FULL_BLOCK, FULL_UNIFORM, Case, relative
from tests.transformer_engine import IMAGE, needs_python
from tests.transformer_engine.delayed import (
    CASE,
    ORDER_TOLERANCE,
    TRUST,
    WRONG,
    features,
    load,
    loaded_features,
    save,
    train_beside,
    trained_model,
    trusted,
)

pytestmark = needs_python


def make_checkpoints(folder: Path) -> list[Tensor]:
    """Make, on every rank, checkpoints with and without real scales; return features of the first one's model."""
    model = trained_model(CASE, 3)
    save(model, folder / "scaled")
    save(model, folder / "converted", extra_state=False)
    save(trained_model(replace(CASE, teacher_options=()), 0), folder / "empty")
    save(trained_model(CASE, 0), folder / "ones")  # no step updated its initial scales
    return features(model, CASE)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Tensor]]:
    folder = tmp_path_factory.mktemp("delayed")
    return folder, run_on_ranks(make_checkpoints, Layout(tp=2), {"folder": folder}, image=IMAGE)[0]


@pytest.mark.parametrize("tp", [1, 2])
def test_features_are_those_of_the_trained_model(tp: int, made: tuple[Path, list[Tensor]]) -> None:
    folder, wanted = made
    case = replace(CASE, tp=tp)
    arguments = {"case": case, "checkpoint": folder / "scaled"}
    for found in run_on_ranks(loaded_features, case.layout, arguments, image=IMAGE):
        errors = [relative(mine - theirs, theirs) for mine, theirs in zip(found, wanted, strict=True)]
        assert max(errors) <= (0 if tp == 2 else ORDER_TOLERANCE)


def unscaled_features(checkpoint: Path) -> list[Tensor]:
    """Return, on every rank, the features with scales that stay 1."""
    with patch.object(loading, "uses_delayed_scaling", lambda _args: False):
        return loaded_features(replace(CASE, tp=2), checkpoint)


def test_with_scale_1_they_would_not_be(made: tuple[Path, list[Tensor]]) -> None:
    folder, wanted = made
    arguments = {"checkpoint": folder / "scaled"}
    for found in run_on_ranks(unscaled_features, Layout(tp=2), arguments, image=IMAGE):
        errors = [relative(mine - theirs, theirs) for mine, theirs in zip(found, wanted, strict=True)]
        assert min(errors) > WRONG


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
    """Return the means without a pipeline, where the teacher's features are the trained model's."""
    arguments = {"case": CASE, "checkpoint": made[0] / "scaled"}
    return run_on_ranks(train_beside, CASE.layout, arguments, image=IMAGE)[0][2]


@pytest.mark.tier("all")
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
    assert results[-1][2]  # the last stage has means


def refused(case: Case, checkpoint: Path) -> None:
    """Check, on every rank, that the checkpoint is refused."""
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


# A checkpoint's arguments, and the teacher's if nothing changes.
STORED = Namespace(
    fp8="hybrid", fp8_recipe="delayed", num_experts=8, moe_grouped_gemm=True, expert_model_parallel_size=2
)


def check(checkpoint: Path, teacher: Namespace = STORED) -> None:
    stored = StoredModel(str(checkpoint.parent), "--teacher-load", checkpoint, STORED)
    check_teacher_scales(Model(Role.TEACHER, teacher, stored))


@pytest.mark.parametrize("kind", ["converted", "empty"])
def test_a_checkpoint_without_scales_is_refused_unloaded(kind: str, made: tuple[Path, list[Tensor]]) -> None:
    with trusted(), pytest.raises(ValueError, match="holds no scales .* use tensorwise, blockwise or mxfp8"):
        check(made[0] / kind)


def test_scales_are_read_from_trusted_checkpoints_alone(made: tuple[Path, list[Tensor]]) -> None:
    with trusted():
        check(made[0] / "scaled")
    with trusted("0"), pytest.raises(ValueError, match=f"if you trust the checkpoint, set {TRUST}=1"):
        check(made[0] / "scaled")


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
    message = "with expert-parallel size 2; at 4 .* use --teacher-expert-model-parallel-size 2, or the rec"
    with trusted(), pytest.raises(ValueError, match=message) if is_refused else nullcontext():
        check(made[0] / "scaled", changed)


def loads_untrusted(case: Case, checkpoint: Path) -> bool:
    """Whether, on every rank, a teacher that needs no scales loads without reading them."""
    model = load(case, Topology.from_megatron(sequence_parallel=False), checkpoint=checkpoint)
    kept = [module.fp8_meta.get("scaling_fwd") for _, module in fp8_linears(model)]
    return not any(hasattr(each, "amax_history") for each in kept)


@pytest.mark.parametrize("options", [(), TENSORWISE], ids=["bf16", "tensorwise"])
def test_other_recipes_do_not_read_them(options: tuple, made: tuple[Path, list[Tensor]]) -> None:
    case = replace(CASE, teacher_options=options)
    assert run_on_ranks(
        loads_untrusted, Layout(), {"case": case, "checkpoint": made[0] / "scaled"}, image=IMAGE
    ) == [True]
