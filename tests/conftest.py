"""What every test shares: the live ranks end with the session."""

from __future__ import annotations

import pytest

from tests import ranks


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Close the pools while multiprocessing still works."""
    ranks.close_pools()
