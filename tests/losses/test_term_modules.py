"""The modules of terms for a tap: they are equal wherever they are made, and their parameters are counted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megatron_fdd.config import FddConfig
from megatron_fdd.losses.term_modules import make_modules, saved_shapes, trained_parameters
from megatron_fdd.losses.terms import TERMS
from tests.oracle.added_term import known

WIDTHS = (6, 10)


@pytest.fixture(autouse=True)
def example() -> Iterator[None]:
    with known():
        yield


def config(*kinds: str) -> FddConfig:
    return FddConfig(teacher_load="T", term=tuple((kind, 0.5) for kind in kinds))


def test_the_same_values_whatever_was_drawn_before_and_whatever_else_is_made() -> None:
    both = config("fixed_mse", "learned_mse")
    torch.manual_seed(1)
    all_taps = make_modules(both, range(3), WIDTHS)
    assert all_taps.keys() == {(kind, tap) for kind in ("fixed_mse", "learned_mse") for tap in range(3)}
    torch.manual_seed(2)
    state = torch.get_rng_state()
    alone = make_modules(config("learned_mse"), [2], WIDTHS)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(alone["learned_mse", 2].weight, all_taps["learned_mse", 2].weight)
    weights = [module.weight for module in all_taps.values()]
    assert not any(torch.equal(one, other) for i, one in enumerate(weights) for other in weights[:i])


def test_the_fixed_projection_keeps_lengths_and_is_in_no_checkpoint() -> None:
    weight_TD = make_modules(config("fixed_mse"), [0], WIDTHS)["fixed_mse", 0].weight
    torch.testing.assert_close(weight_TD.T @ weight_TD, torch.eye(6))
    assert make_modules(config("fixed_mse"), [0], (6, 6)) == {}
    assert saved_shapes(config("fixed_mse"), 3, WIDTHS) == {}
    assert trained_parameters(config("fixed_mse"), range(3), WIDTHS) == 0


def test_a_module_that_is_another_at_each_call_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one that is drawn by numpy: ranks would train different ones."""
    drawn = iter(range(10))

    def make(*_: object) -> torch.nn.Module:
        module = torch.nn.Linear(2, 2)
        torch.nn.init.constant_(module.weight, next(drawn))
        return module

    monkeypatch.setattr(type(TERMS[-1]), "make_module", make)
    with pytest.raises(ValueError, match="the same at every call, or ranks would train different ones"):
        saved_shapes(config(TERMS[-1].kind), 3, (6, 11))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_parameters_that_are_not_finite_are_named(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """Such as what torch.empty leaves; NaN is no equal of itself, so it must not be taken for another module."""

    def make(*_: object) -> torch.nn.Module:
        module = torch.nn.Linear(2, 2)
        torch.nn.init.constant_(module.bias, value)
        return module

    monkeypatch.setattr(type(TERMS[-1]), "make_module", make)
    with pytest.raises(ValueError, match="make_module gives bias values that are not finite: set each with"):
        saved_shapes(config(TERMS[-1].kind), 3, (6, 12))


def test_names_and_sizes_of_what_is_learned() -> None:
    learned = config("fixed_mse", "learned_mse")
    names = [f"learned_mse.{tap}.weight" for tap in range(2)]
    assert saved_shapes(learned, 2, WIDTHS) == dict.fromkeys(names, (10, 6))
    assert trained_parameters(learned, [1, 2], WIDTHS) == 2 * 60


def test_a_term_that_compares_taps_has_nothing_for_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(TERMS[-1]), "reach", 1)
    assert make_modules(config("learned_mse"), range(3), WIDTHS).keys() == {
        ("learned_mse", 1),
        ("learned_mse", 2),
    }
    assert trained_parameters(config("learned_mse"), range(3), WIDTHS) == 2 * 60
