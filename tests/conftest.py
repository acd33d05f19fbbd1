"""What every test shares: live ranks and the fork server end with the session."""

from __future__ import annotations

import os

import pytest
import torch

from tests.harness import forked_python, ranks

# Without a GPU, Triton's kernels run in its interpreter; it looks when a kernel is defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Their asserts say what was compared, as those of the tests do.
pytest.register_assert_rewrite("tests.oracle.case", "tests.entry.checks", "tests.transformer_engine.steps")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Close the pools while multiprocessing still works, and the server of forked programs."""
    ranks.close_pools()
    forked_python.close()
