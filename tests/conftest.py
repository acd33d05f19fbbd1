"""What every test shares: the tiers, and that live ranks and the fork server end with the session."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.harness import forked_python, ranks, tiers

# Without a GPU, Triton's kernels run in its interpreter; it looks when a kernel is defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Their asserts say what was compared, as those of the tests do.
pytest.register_assert_rewrite("tests.oracle.case", "tests.entry.checks", "tests.transformer_engine.steps")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--tier", choices=tiers.TIERS, default="all", help="how much to run (default: everything)"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "tier(name): fast, default or all; see tests/harness/tiers.py")
    tiers.watch_programs()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not even import a folder that is beyond the tier."""
    return tiers.is_beyond(tiers.tier_of_folder(collection_path), config.getoption("tier")) or None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = config.getoption("tier")
    beyond = [item for item in items if tiers.is_beyond(tiers.tier_of(item), chosen)]
    if beyond:
        config.hook.pytest_deselected(items=beyond)
        items[:] = [item for item in items if not tiers.is_beyond(tiers.tier_of(item), chosen)]
    items.sort(key=lambda item: tiers.place(item.path))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    tiers.begin(item)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Close the pools while multiprocessing still works, and the server of forked programs."""
    ranks.close_pools()
    forked_python.close()
