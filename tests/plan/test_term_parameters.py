"""The parameters of terms in a checkpoint to resume from, compared with those of the run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron_fdd.config import FddConfig
from megatron_fdd.losses.pairs import LayerPair
from megatron_fdd.plan import term_parameters
from megatron_fdd.plan.context import Context
from megatron_fdd.plan.term_parameters import check_term_parameters, fresh_parameters
from tests.oracle.added_term import known

PAIRS = (LayerPair(1, 2), LayerPair(2, 4))
NAMES = [f"fdd_terms.learned_mse.{pair}.weight" for pair in range(2)]


def resuming() -> Context:
    """Return a run whose student is 6 wide and its teacher 10."""
    stored = SimpleNamespace(flag="--load", folder="run", path=Path("run"), args=SimpleNamespace())
    config = FddConfig(teacher_load="T", term=(("learned_mse", 1.0),))
    run = SimpleNamespace(
        args=SimpleNamespace(hidden_size=6),
        stored_student=stored,
        teacher_size=SimpleNamespace(num_layers=8, hidden_size=10, vocab_size=20),
        plan=SimpleNamespace(config=config, pairs=PAIRS),
        resumes_optimizer=True,
    )
    return cast(Context, run)


def test_parameters_of_another_shape_are_refused_and_would_begin_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there: dict[str, Any] = dict.fromkeys(NAMES, (10, 6))
    monkeypatch.setattr(term_parameters, "term_shapes", lambda _path, _flag: there)
    with known():
        check_term_parameters(resuming())
        assert fresh_parameters(resuming()) == frozenset()
        there[NAMES[1]] = (12, 6)
        with pytest.raises(ValueError, match=rf"run's \(of another shape: {NAMES[1]}\); give the same"):
            check_term_parameters(resuming())
        assert fresh_parameters(resuming()) == {NAMES[1]}
