"""The copy stream of features that wait in host memory: pinned blocks, tensors that are freed while they are copied."""

from __future__ import annotations

import torch

from megatron_fdd.step.teacher.host_memory import HostMemory

# Cycles of the GPU's clock, more than a copy takes.
SLEEP = 100_000_000


def test_copies_keep_their_order_beside_a_busy_stream() -> None:
    memory = HostMemory()
    numbers = torch.arange(2**20, device="cuda", dtype=torch.float32)
    for step in range(3):
        torch.cuda._sleep(SLEEP)
        given = numbers * (step + 1)
        copy = memory.keep(given)
        assert copy.host.is_pinned()
        del given
        torch.full_like(numbers, torch.nan)  # could take the memory that is still being copied
        arriving = memory.fetch(copy)
        memory.free([copy])
        memory.free([memory.keep(torch.full_like(numbers, torch.nan))])  # takes the same block
        assert torch.equal(arriving.wait(), numbers * (step + 1))
    assert memory.num_bytes == numbers.nbytes


def test_a_fetch_does_not_wait_for_the_computation() -> None:
    memory = HostMemory()
    copy = memory.keep(torch.ones(2**20, device="cuda"))
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP)
    busy = torch.cuda.Event()
    busy.record()
    arriving = memory.fetch(copy)
    arriving.done.synchronize()
    assert not busy.query()
    assert arriving.wait().all()
