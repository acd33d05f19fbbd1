"""The groups of a resumed optimizer: each takes the rates of its counterpart, and no other's."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_fdd.host.patches.rates import _told_groups, give_saved_rates


def group(max_lr: float | None, *, wd_mult: float = 1.0, **more: Any) -> dict[str, Any]:
    """Return a group as Megatron makes it; `default_config` is False for a group of --decoupled-lr."""
    plain = {"wd_mult": wd_mult, "lr_mult": 1.0, "is_expert_parallel": False, "default_config": True}
    rates = {} if max_lr is None else {"max_lr": max_lr, "min_lr": max_lr / 10}
    return plain | rates | more


def rates(groups: list[dict[str, Any]]) -> list[tuple[float, float]]:
    return [(each["max_lr"], each["min_lr"]) for each in groups]


def test_groups_are_found_in_any_order() -> None:
    saved = [
        group(3.0, default_config=False),
        group(1.0, wd_mult=0.0),
        group(1.0),
        group(2.0, is_expert_parallel=True),
    ]
    groups = [group(9.0), group(9.0, is_expert_parallel=True), group(8.0, default_config=False)]
    groups += [group(9.0, wd_mult=0.0)]
    give_saved_rates(groups, saved)
    assert rates(groups) == [(1.0, 0.1), (2.0, 0.2), (3.0, 0.3), (1.0, 0.1)]


def test_a_group_without_one_certain_counterpart_keeps_its_rates() -> None:
    groups = [group(9.0), group(9.0, wd_mult=0.0)]
    give_saved_rates(groups, [group(1.0), group(2.0), group(1.0, wd_mult=0.5)])
    assert rates(groups) == [(9.0, 0.9), (9.0, 0.9)]


def test_an_older_megatrons_groups_have_no_rates() -> None:
    groups = [group(9.0)]
    give_saved_rates(groups, [group(None)])
    assert rates(groups) == [(None, None)]


@pytest.mark.parametrize(
    "error",
    [
        KeyError((None, 0.1)),
        ValueError("Could not find parameter group with key x in loaded checkpoint"),
        ValueError(
            "Cannot merge two lists with different lengths (2 and 3, at level ('optimizer', 'param_groups'))"
        ),
    ],
)
def test_groups_without_a_counterpart_are_told(error: Exception) -> None:
    with (
        pytest.raises(ValueError, match=r"^--load run: its optimizer has other groups of parameters"),
        _told_groups("run"),
    ):
        raise error


def test_other_errors_stay() -> None:
    with pytest.raises(KeyError, match="x"), _told_groups("run"):
        raise KeyError("x")
