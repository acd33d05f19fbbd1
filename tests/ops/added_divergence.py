"""The worked example of a divergence from outside, and its oracle."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from torch import Tensor

from megatron_fdd.ops.divergence import DIVERGENCES
from tests.oracle import reference

EXAMPLE = Path(__file__).parents[2] / "examples/extend/divergence.py"


def total_variation(log_t: Tensor, log_s: Tensor, _mix: float) -> Tensor:
    """Sum the teacher's probability above the student's; the student's above the teacher's has the same sum."""
    return (log_t.exp() - log_s.exp()).clamp(min=0).sum(-1)


@contextmanager
def known() -> Iterator[None]:
    """Make `tv` known to the package, in the way of the example, and to the oracle."""
    spec = importlib.util.spec_from_file_location("examples_extend_divergence", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    with patch.dict(DIVERGENCES), patch.dict(reference.DIVERGENCES, tv=total_variation):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        assert "tv" in DIVERGENCES
        yield
