"""What every test shares: the live ranks end with the session."""

from __future__ import annotations

import pytest

from tests import ranks

# Its asserts say what was compared, as those of the tests do.
pytest.register_assert_rewrite("tests.case")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Close the pools while multiprocessing still works."""
    ranks.close_pools()
