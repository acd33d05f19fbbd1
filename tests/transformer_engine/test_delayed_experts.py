"""A teacher of experts in FP8 with delayed scaling; see `test_delayed.py`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest

from megatron_fdd.teacher import loading
from tests.case import relative
from tests.ranks import Layout, run_on_ranks
from tests.transformer_engine import IMAGE, needs_python, test_delayed
from tests.transformer_engine.test_delayed import CASE, DELAYED, WRONG
from tests.transformer_engine.test_experts import KINDS

pytestmark = needs_python


def errors_and_changed(folder: Path, kind: str) -> tuple[list[float], list[float], list[str]]:
    """Body on one rank: how far features are from the trained model's, with scales and without; what a run changes."""
    options = DELAYED + KINDS[kind]
    case = replace(CASE, teacher=replace(CASE.teacher, experts=4, ffn=64), teacher_options=options)
    checkpoint = folder / "scaled"
    with patch.object(test_delayed, "CASE", case):
        model = test_delayed.trained_model(options, 3)
        test_delayed.save(model, checkpoint)
        wanted = test_delayed.features(model, case)
    found = [test_delayed.loaded_features(case, checkpoint)]
    with patch.object(loading, "uses_delayed_scaling", lambda _args: False):
        found.append(test_delayed.loaded_features(case, checkpoint))
    scaled, unscaled = (
        [relative(mine - theirs, theirs) for mine, theirs in zip(each, wanted, strict=True)] for each in found
    )
    changed, _, _ = test_delayed.train_beside(case, checkpoint)
    return scaled, unscaled, changed


@pytest.mark.parametrize("kind", KINDS)
def test_experts_compute_what_the_trained_model_does(kind: str, tmp_path: Path) -> None:
    [(scaled, unscaled, changed)] = run_on_ranks(
        errors_and_changed, Layout(), {"folder": tmp_path, "kind": kind}, image=IMAGE
    )
    assert max(scaled) == 0
    assert min(unscaled) > WRONG
    assert changed == []
