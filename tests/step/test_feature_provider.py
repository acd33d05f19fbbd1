"""The datasets of a run with stored teachers: looked up before models are loaded, and built once."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_fdd.step.teacher import provider

ARGS = {
    "train_iters": None,
    "train_samples": 9,
    "global_batch_size": 4,
    "step_batch_size_schedule": None,
    "phase_transition_iterations": None,
    "virtual_pipeline_model_parallel_size": 2,
    "sequence_parallel": False,
    "seq_length": 8,
}
STORE = SimpleNamespace(
    named=SimpleNamespace(prefixes=()), plan=SimpleNamespace(chunks_on=lambda _: [None, None]), store=None
)
NUM_SAMPLES = (9, 0, 0)


class Calls(list[tuple[Any, ...]]):
    """What was called, in order: "build" with what was asked for, and "look up"."""

    def build(self, num_samples: Any, vp_stage: int | None = None) -> list[Any]:
        self.append(("build", tuple(num_samples), vp_stage))
        return [["a set"], None, None]

    def look_up(self, *_: object) -> None:
        self.append(("look up",))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    found, place = Calls(), SimpleNamespace(stage=0)
    monkeypatch.setattr(provider, "check_coverage", found.look_up)
    monkeypatch.setattr(provider, "sources_of", lambda *_: [])
    monkeypatch.setattr(provider, "read_blocks", lambda *_: ())
    monkeypatch.setattr(provider, "read_ranges", lambda *_: ())
    monkeypatch.setattr(provider.Topology, "from_megatron", lambda **_: place)
    return found


@pytest.fixture
def make(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    def made(**more: object) -> tuple[provider.FeatureProvider, Any]:
        args: Any = SimpleNamespace(**{**ARGS, **more})
        monkeypatch.setattr(
            provider, "get_train_valid_test_num_samples", lambda: NUM_SAMPLES if args.train_iters else None
        )
        stores: Any = [STORE]
        return provider.FeatureProvider(calls.build, stores, args), args

    return made


def test_the_datasets_that_are_looked_up_are_those_that_are_read(
    make: Callable[..., Any], calls: Calls
) -> None:
    provide, args = make()
    assert provide.check_first(["a chunk"]) == ["a chunk"]
    looked_up = [("build", NUM_SAMPLES, 0), ("look up",)]
    assert calls == looked_up
    assert args.train_iters is None  # with it Megatron would take the rates' schedule of iterations
    assert provide(list(NUM_SAMPLES), vp_stage=0) == [["a set"], None, None]
    assert calls == looked_up
    provide(NUM_SAMPLES, vp_stage=1)
    assert calls == [*looked_up, ("build", NUM_SAMPLES, 1)]


def test_another_number_of_samples_is_looked_up_too(make: Callable[..., Any], calls: Calls) -> None:
    """It is asked for by a training script's own loop."""
    provide, _ = make(virtual_pipeline_model_parallel_size=None)
    provide.check_first([])
    provide((8, 0, 0))
    provide((8, 0, 0))
    assert calls[::2] == [("build", NUM_SAMPLES, None), *[("build", (8, 0, 0), None)] * 2]
    assert calls[1::2] == [("look up",)] * 3


def test_the_samples_of_a_phase_are_looked_up_when_the_checkpoint_is_read(
    make: Callable[..., Any], calls: Calls
) -> None:
    provide, _ = make(phase_transition_iterations=[1])
    provide.check_first([])
    assert calls == []
    provide(NUM_SAMPLES, vp_stage=0)
    assert calls == [("build", NUM_SAMPLES, 0), ("look up",)]
