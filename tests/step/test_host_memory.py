"""The teacher's features in host memory: the numbers of the oracle, memory that is used again, copies one ahead."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch

from megatron_fdd.step.teacher.host_memory import Arriving, HostCopy, HostMemory
from megatron_fdd.step.teacher.pipelined import PipelinedTeacher
from tests.harness.ranks import distributed, run_on_ranks
from tests.oracle.case import Case, assert_equal, expected, join, run_step, schedule_step

pytestmark = pytest.mark.tier("default")


@distributed(ranks=1)
def test_memory_that_is_given_back_is_used_again() -> None:
    memory = HostMemory()
    first = torch.randn(3, 5, 7)
    copies = [memory.keep(first), memory.keep(first.bfloat16())]
    assert torch.equal(memory.fetch(copies[0]).wait(), first)
    assert torch.equal(memory.fetch(copies[1]).wait(), first.bfloat16())
    held = memory.num_bytes
    assert held == 2 * 4096  # whole pages
    memory.free(copies)
    again = [memory.keep(2 * first), memory.keep(first.half())]
    assert memory.num_bytes == held
    assert torch.equal(memory.fetch(again[0]).wait(), 2 * first)
    memory.keep(first)
    assert memory.num_bytes == held + 4096


CASE = Case(pp=2, micro_batches=4, offload=True)


@pytest.mark.parametrize(
    "case", [CASE, Case(pp=2, vpp=3, micro_batches=4, offload=True)], ids=["pp2", "pp2-vpp3"]
)
def test_the_losses_do_not_depend_on_where_features_wait(case: Case) -> None:
    wanted = expected(case)
    for result in run_on_ranks(run_step, case.layout, {"case": case}):
        assert_equal(result, wanted)


class Watched(HostMemory):
    """A host memory that remembers what was fetched from it."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[HostCopy] = []

    def fetch(self, copy: HostCopy) -> Arriving:
        self.fetched.append(copy)
        return super().fetch(copy)


def watch(case: Case) -> list[tuple[list[bool], int]]:
    """Return, on every rank, for three steps: which micro-batches were fetched before they were asked for; bytes."""
    real_features = PipelinedTeacher.features
    were_fetched: list[bool] = []
    memories: list[Watched] = []

    def features(self: PipelinedTeacher, index: int, batch: Any) -> Any:
        assert isinstance(self._host, Watched)
        memories.append(self._host)
        wanted = [*self._received[index].values(), *self._final[index : index + 1]]
        were_fetched.append(all(any(each is copy for copy in self._host.fetched) for each in wanted))
        return real_features(self, index, batch)

    found = []
    with (
        patch("megatron_fdd.step.teacher.pipelined.HostMemory", Watched),
        patch.object(PipelinedTeacher, "features", features),
    ):
        chunks, _, steps = join(case)
        for _ in range(3):
            schedule_step(case, chunks, steps)
            found.append((were_fetched.copy(), memories[-1].num_bytes))
            were_fetched.clear()
    return found


def test_the_next_micro_batch_is_fetched_ahead_and_memory_does_not_grow() -> None:
    for stage in run_on_ranks(watch, CASE.layout, {"case": CASE}):
        assert [ahead for ahead, _ in stage] == 3 * [[False, True, True, True]]
        assert len({num_bytes for _, num_bytes in stage}) == 1
