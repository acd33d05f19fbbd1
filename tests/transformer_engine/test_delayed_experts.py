"""A teacher of experts in FP8 with delayed scaling; see `test_delayed.py`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
from torch import Tensor

from megatron_fdd.step.teacher import loading
from tests.harness.ranks import Layout, run_on_ranks
from tests.oracle.case import Case, relative
from tests.transformer_engine import IMAGE, needs_python
from tests.transformer_engine.delayed import (
    CASE,
    DELAYED,
    ORDER_TOLERANCE,
    WRONG,
    features,
    loaded_features,
    save,
    train_beside,
    trained_model,
)
from tests.transformer_engine.steps import KINDS

pytestmark = needs_python

SIZES = [pytest.param(1, id="1x1"), pytest.param(2, id="ep2")]


def with_experts(kind: str, size: int) -> Case:
    """Return a case with a teacher of experts, at an expert-parallel size."""
    return replace(
        CASE,
        dp=size,
        ep=size,
        teacher_ep=size,
        teacher=replace(CASE.teacher, experts=4, ffn=64),
        teacher_options=DELAYED + KINDS[kind],
    )


def make_checkpoint(folder: Path, kind: str, size: int) -> list[Tensor]:
    """Train and save a model on every rank; return its features."""
    case = with_experts(kind, size)
    model = trained_model(case, 3)
    save(model, folder / "scaled")
    return features(model, case)


def errors(folder: Path, kind: str, size: int, wanted: list[Tensor]) -> tuple[list[float], list[float]]:
    """Return, on every rank, the distances of features from the trained model's, with scales and without."""
    case = with_experts(kind, size)
    found = [loaded_features(case, folder / "scaled")]
    with patch.object(loading, "uses_delayed_scaling", lambda _args: False):
        found.append(loaded_features(case, folder / "scaled"))
    scaled, unscaled = (
        [relative(mine - theirs, theirs) for mine, theirs in zip(each, wanted, strict=True)] for each in found
    )
    return scaled, unscaled


def changed_by_a_run(folder: Path, kind: str, size: int) -> list[str]:
    """Return, on every rank, the teacher's scales that a run changes."""
    changed, _, _ = train_beside(with_experts(kind, size), folder / "scaled")
    return changed


@pytest.mark.tier("all")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_experts_compute_what_the_trained_model_does(kind: str, size: int, tmp_path: Path) -> None:
    layout, arguments = Layout(dp=size, ep=size), {"folder": tmp_path, "kind": kind, "size": size}
    wanted = run_on_ranks(make_checkpoint, layout, arguments, image=IMAGE)[0]
    for scaled, unscaled in run_on_ranks(errors, layout, arguments | {"wanted": wanted}, image=IMAGE):
        assert max(scaled) == 0
        assert min(unscaled) > WRONG
    for changed in run_on_ranks(changed_by_a_run, layout, arguments, image=IMAGE):
        assert changed == []


@pytest.mark.tier("all")
@pytest.mark.parametrize(("trained", "loaded"), [(2, 1), (1, 2)])
def test_experts_in_turn_keep_their_scales_at_another_size(trained: int, loaded: int, tmp_path: Path) -> None:
    """Experts that are multiplied together do not keep them, and are refused."""
    arguments = {"folder": tmp_path, "kind": "sequential"}
    made = Layout(dp=trained, ep=trained)
    wanted = run_on_ranks(make_checkpoint, made, arguments | {"size": trained}, image=IMAGE)[0]
    arguments |= {"size": loaded, "wanted": wanted}
    for scaled, unscaled in run_on_ranks(errors, Layout(dp=loaded, ep=loaded), arguments, image=IMAGE):
        assert max(scaled) <= ORDER_TOLERANCE
        assert min(unscaled) > WRONG
