"""Memory that tensors have one after the other: used again, never by two at a time, and within its bytes."""

from __future__ import annotations

import torch

from megatron_fdd.host.buffers import Buffers

MIB = 1 << 20


def test_the_memory_of_a_tensor_that_is_gone_is_used_again() -> None:
    buffers = Buffers()
    first = buffers.empty((2, MIB), torch.bfloat16)
    assert (first.shape, first.dtype, first.is_contiguous()) == ((2, MIB), torch.bfloat16, True)
    place, view = first.data_ptr(), first[1:].view(torch.uint8)
    del first
    view.fill_(3)
    second = buffers.empty((2 * MIB,), torch.bfloat16)  # a view of the first one is left
    assert second.data_ptr() != place
    second.fill_(1)
    assert bool((view == 3).all())
    del view
    assert buffers.idle_bytes == 4 * MIB
    third = buffers.empty((3 * MIB,), torch.uint8)
    assert (third.data_ptr(), third.nbytes, buffers.idle_bytes) == (place, 3 * MIB, 0)


def test_memory_that_is_too_large_or_too_small_is_left_alone() -> None:
    buffers = Buffers()
    tensors = [buffers.empty((size * MIB,), torch.uint8) for size in (2, 16)]
    places = {each.nbytes: each.data_ptr() for each in tensors}
    tensors.clear()
    kept = buffers.empty((3 * MIB,), torch.uint8)
    assert kept.data_ptr() not in places.values()
    assert buffers.idle_bytes == 18 * MIB
    assert buffers.empty((5 * MIB,), torch.uint8).data_ptr() == places[16 * MIB]


def test_no_more_lies_idle_than_is_allowed() -> None:
    buffers = Buffers(max_idle_bytes=5 * MIB)
    tensors = [buffers.empty((2 * MIB,), torch.uint8) for _ in range(4)]
    del tensors
    assert buffers.idle_bytes == 4 * MIB
    large = buffers.empty((6 * MIB,), torch.uint8)
    del large
    assert buffers.idle_bytes == 0


def test_small_and_empty_tensors_have_their_own_memory() -> None:
    buffers = Buffers()
    for shape in ((3, 5), (0, 4), ()):
        assert buffers.empty(shape, torch.float32).shape == shape
    assert buffers.idle_bytes == 0
