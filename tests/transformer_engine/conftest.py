"""Skips where TransformerEngine's Python has not been put beside the packages."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if (Path(sys.prefix) / "transformer-engine").is_dir():
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs TransformerEngine's Python: source tools/env.sh"))
