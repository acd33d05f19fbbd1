"""Tests that need a GPU. Elsewhere they skip: `bash tests/gpu/run.sh` runs them where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The hook is given the items of the whole session."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU (CUDA): torch sees none")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(skip)
