"""The tiers of tests: what `fast` refuses, and which tests are in which."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.harness import tiers
from tests.harness.ranks import Layout, distributed, run_on_ranks


def _nothing() -> None:
    """Body on every rank."""


@distributed(ranks=1)
def _on_ranks() -> None:
    """A test body that is decorated."""


def test_a_fast_test_starts_no_rank() -> None:
    with pytest.raises(
        pytest.fail.Exception, match=r"starts live ranks: mark it `@pytest.mark.tier\(\"default\"\)`"
    ):
        run_on_ranks(_nothing, Layout(ranks=1))


def test_a_fast_test_starts_no_program() -> None:
    with pytest.raises(pytest.fail.Exception, match="test_a_fast_test_starts_no_program starts a program"):
        subprocess.run(["true"], check=True)


@pytest.mark.tier("default")
def test_other_tests_may() -> None:
    subprocess.run(["true"], check=True)
    run_on_ranks(_nothing, Layout(ranks=1))


def test_a_decorated_body_is_beyond_fast() -> None:
    assert [mark.args for mark in _on_ranks.pytestmark if mark.name == "tier"] == [("default",)]


@pytest.mark.parametrize(
    ("path", "tier"),
    [("entry/test_launch.py", "default"), ("scripts/test_study.py", "all"), ("ops/test_delta.py", "fast")],
)
def test_a_folder_has_a_tier(path: str, tier: str) -> None:
    assert tiers.tier_of_folder(tiers.ROOT / path) == tier
    assert tiers.tier_of_folder(Path("/elsewhere/test_x.py")) == "fast"


def test_a_tier_has_those_before_it() -> None:
    for chosen, run in (("fast", 1), ("default", 2), ("all", 3)):
        assert [tier for tier in tiers.TIERS if not tiers.is_beyond(tier, chosen)] == list(tiers.TIERS[:run])


def test_what_takes_long_comes_first_and_is_there() -> None:
    for place, start in enumerate(tiers.LONGEST):
        files = [
            path
            for path in tiers.ROOT.rglob("test_*.py")
            if path.relative_to(tiers.ROOT).as_posix().startswith(start)
        ]
        assert files, start
        assert all(tiers.place(path) <= place for path in files)
    assert tiers.place(tiers.ROOT / "test_config.py") == len(tiers.LONGEST)
