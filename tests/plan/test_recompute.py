"""Recomputed groups that hide a tapped block are refused."""

from __future__ import annotations

import pytest

from megatron_fdd.plan.recompute import check_recompute_keeps_taps


@pytest.mark.parametrize(
    "recompute", [("full", "uniform", 1), ("full", "block", 2), ("selective", None, None)]
)
def test_harmless_recompute_passes(recompute: tuple[str, str | None, int | None]) -> None:
    check_recompute_keeps_taps([0, 2, 4], [6], recompute)


def test_uniform_groups_keep_only_their_ends() -> None:
    check_recompute_keeps_taps([1, 3, 6], [7], ("full", "uniform", 2))  # block 7 ends the short last group
    with pytest.raises(ValueError, match=r"hides the tapped blocks \[1, 3\]"):
        check_recompute_keeps_taps([0, 1, 2], [6], ("full", "uniform", 2))
    # Groups start again on each stage: blocks 2, 3 | 5, 6 are ends.
    check_recompute_keeps_taps([1, 2, 4, 5], [3, 3], ("full", "uniform", 2))
    with pytest.raises(ValueError, match=r"hides the tapped blocks \[4\]"):
        check_recompute_keeps_taps([1, 3], [3, 3], ("full", "uniform", 2))
