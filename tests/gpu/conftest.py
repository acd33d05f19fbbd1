"""Tests that need a GPU: `bash tests/gpu/run.sh` runs them. Elsewhere they skip, unless they say otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the items of this folder; the hook gets the items of the whole session."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU (CUDA): torch sees none")
    for item in items:
        runs_anywhere = getattr(getattr(item, "module", None), "RUNS_WITHOUT_A_GPU", False)
        if Path(__file__).parent in item.path.parents and not runs_anywhere:
            item.add_marker(skip)
