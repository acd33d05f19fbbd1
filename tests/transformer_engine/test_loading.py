"""A teacher in FP8 from a checkpoint in full precision at another layout: each weight is rounded as a whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_fdd.host.topology import Topology
from tests.harness.ranks import Layout, run_on_ranks
from tests.oracle.case import Case, frozen_teacher
from tests.oracle.models import build_student
from tests.oracle.reference import random_weights
from tests.transformer_engine import IMAGE, needs_python
from tests.transformer_engine.casts import is_fp8
from tests.transformer_engine.delayed import CASE, load, save
from tests.transformer_engine.steps import fp8

pytestmark = needs_python

GROUPED = (("moe_grouped_gemm", True),)
DENSE = replace(CASE, teacher=replace(CASE.teacher, ffn=192))
MODELS = {
    "dense": DENSE,
    "grouped experts": replace(DENSE, teacher=replace(DENSE.teacher, experts=4, ffn=64)),
}


def options_of(name: str) -> tuple[tuple[str, Any], ...]:
    return GROUPED if "grouped" in name else ()


def make_checkpoints(folder: Path) -> None:
    """Make the checkpoints, on every rank."""
    topology = Topology.from_megatron(sequence_parallel=False)
    for name, case in MODELS.items():
        weights, options = random_weights(case.teacher, 2), dict(options_of(name))
        options["transformer_impl"] = "transformer_engine"
        chunks = build_student(case.teacher, weights, topology, torch.float32, **options)
        save(unwrap_model(chunks)[0], folder / name, extra_state=False)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    run_on_ranks(make_checkpoints, Layout(tp=2), {"folder": folder}, image=IMAGE)
    return folder


def parts(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return the parts of each weight in FP8: numbers and scales."""
    return {
        f"{name} {part}": value
        for name, weight in model.named_parameters()
        if is_fp8(weight)
        for part, value in vars(weight).items()
        if isinstance(value, Tensor)
    }


def loaded_and_rounded(case: Case, checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return, on every rank, weights as a run loads them, and whole weights rounded by their own quantizers."""
    topology = Topology.from_megatron(sequence_parallel=False)
    return parts(load(case, topology, checkpoint=checkpoint)), parts(frozen_teacher(case, topology))


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
@pytest.mark.parametrize("name", MODELS)
def test_a_weight_is_rounded_as_a_whole(name: str, recipe: str, tp: int, checkpoints: Path) -> None:
    case = replace(MODELS[name], tp=tp, teacher_options=fp8(recipe) + options_of(name))
    for found, wanted in run_on_ranks(
        loaded_and_rounded, case.layout, {"case": case, "checkpoint": checkpoints / name}, image=IMAGE
    ):
        assert found.keys() == wanted.keys()
        assert len(found) > 4 * case.teacher.num_layers
        assert all(torch.equal(found[key], wanted[key]) for key in found)
