"""The table of checks: every check of the room is in it once, and a plan leaves out those that need the machine."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest

from megatron_fdd import plan
from megatron_fdd.plan import checks
from megatron_fdd.plan.checks import PHASES, Check, make_checks
from megatron_fdd.plan.written_files import make_folders


def test_every_check_of_what_is_known_is_in_one_phase() -> None:
    listed = [check.function for phase in PHASES for check in phase]
    assert len(listed) == len(set(listed)) > 20
    written = {
        function
        for module in pkgutil.iter_modules(plan.__path__, f"{plan.__name__}.")
        for name, function in inspect.getmembers(importlib.import_module(module.name), inspect.isfunction)
        if name.startswith(("check_", "warn_"))
        and [*inspect.signature(function).parameters.values()][0].annotation in ("Context", "Model")
    }
    assert written - set(listed) == set()


def test_every_phase_is_made() -> None:
    """Phases are made in the order of the table."""
    names = [name for name, value in vars(checks).items() if any(value is phase for phase in PHASES)]
    source = inspect.getsource(importlib.import_module("megatron_fdd.plan.run"))
    places = [source.index(f"checks.{name}, known") for name in names]
    assert len(names) == len(PHASES)
    assert places == sorted(places)


def test_folders_are_made_when_nothing_is_left_to_refuse() -> None:
    """A refused run leaves no empty folder of --save behind."""
    assert PHASES[-1][-1].function is make_folders


def refuse(_known: object) -> None:
    raise ValueError("refused")


def test_a_plan_leaves_out_what_needs_the_machine() -> None:
    phase = (Check(refuse, needs_machine=True),)
    make_checks(phase, None, to_plan=True)
    with pytest.raises(ValueError, match="refused"):
        make_checks(phase, None, to_plan=False)


def test_the_first_refusal_ends_a_phase() -> None:
    seen: list[str] = []
    phase = (Check(seen.append), Check(refuse), Check(seen.append))
    with pytest.raises(ValueError, match="refused"):
        make_checks(phase, "known", to_plan=True)
    assert seen == ["known"]
