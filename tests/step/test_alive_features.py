"""Memory under 1F1B: features are alive for no more micro-batches than Megatron's schedule holds anyway."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import patch

import pytest
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_fdd.losses.objective import Objective
from tests.harness.ranks import run_on_ranks
from tests.oracle.case import Case, run_step
from tests.oracle.plain_training import train_plainly
from tests.oracle.reference import Terms

pytestmark = pytest.mark.tier("default")


class Alive:
    """A count of the micro-batches whose features exist at once: memory counts, whatever Python object refers to it."""

    def __init__(self) -> None:
        self.most = {"taps": 0, "received": 0}
        self._kept: dict[str, list[list[StorageWeakRef]]] = {"taps": [], "received": []}

    def register(self, kind: str, tensors: Sequence[Tensor]) -> None:
        """Register the tensors of one micro-batch."""
        self._kept[kind].append([StorageWeakRef(tensor.untyped_storage()) for tensor in tensors])
        self.most[kind] = max(self.most[kind], self.count(kind))

    def count(self, kind: str) -> int:
        return sum(not all(each.expired() for each in group) for group in self._kept[kind])

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch sampled layers as they reach the terms, and the tensors that the student's stages receive."""
        real_inner, real_set = Objective.inner, GPTModel.set_input_tensor

        def inner(objective: Objective, taps_SBD: Sequence[Tensor], *rest: Any) -> Any:
            self.register("taps", taps_SBD)
            return real_inner(objective, taps_SBD, *rest)

        def set_input(model: GPTModel, tensors: Any) -> None:
            if model.training and not model.pre_process:
                self.register("received", [tensors] if isinstance(tensors, Tensor) else tensors)
            real_set(model, tensors)

        with patch.object(Objective, "inner", inner), patch.object(GPTModel, "set_input_tensor", set_input):
            yield


def count_alive(case: Case, body: Any = run_step, keep: bool = False) -> tuple[dict[str, int], int]:
    """Return, on every rank, the most that were alive, and how many taps are left after the step."""
    alive = Alive()
    with alive.watching(), keeping_taps() if keep else contextlib.nullcontext():
        body(case)
    return alive.most, alive.count("taps")


@contextlib.contextmanager
def keeping_taps() -> Iterator[None]:
    """Make a mistake: keep the features of all micro-batches until the step ends."""
    kept: list[Sequence[Tensor]] = []
    real_inner = Objective.inner

    def inner(objective: Objective, taps_SBD: Sequence[Tensor], *rest: Any) -> Any:
        kept.append(taps_SBD)
        return real_inner(objective, taps_SBD, *rest)

    with patch.object(Objective, "inner", inner):
        yield


@pytest.mark.parametrize(
    ("case", "taps"),
    [
        # 1F1B holds (stages - stage) micro-batches.
        (Case(pp=4, micro_batches=8), [4, 3, 0, 0]),
        (Case(pp=4, micro_batches=8, terms=Terms(pairs=((1, 1), (5, 9)))), [4, 0, 2, 0]),
        (Case(pp=4, micro_batches=8, terms=Terms(pairs=((4, 6), (6, 10)))), [0, 3, 0, 1]),
        (Case(pp=2, micro_batches=6), [2, 1]),
    ],
)
def test_no_more_features_are_alive_than_the_schedule_needs(case: Case, taps: list[int]) -> None:
    results = run_on_ranks(count_alive, case.layout, {"case": case})
    assert [most["taps"] for most, _ in results] == taps
    assert not any(left for _, left in results)
    # A carry lives in the tensor that a stage receives; Megatron's schedule holds it for one micro-batch more.
    plain = run_on_ranks(count_alive, case.layout, {"case": case, "body": train_plainly})
    received = [most["received"] for most, _ in results]
    assert received == [most["received"] for most, _ in plain]
    assert all(number <= case.pp - stage + 1 for stage, number in enumerate(received))


def test_features_that_are_kept_would_be_noticed() -> None:
    case = Case(pp=2, micro_batches=6)
    results = run_on_ranks(count_alive, case.layout, {"case": case, "keep": True})
    assert [most["taps"] for most, _ in results] == [6, 6]
