"""Work done ahead: in order, side by side, within its bytes; its errors and its end."""

from __future__ import annotations

import threading
from contextlib import closing

import pytest

from megatron_fdd.host.ahead import ahead

MIB = 1 << 20


def test_results_are_in_order_and_made_side_by_side() -> None:
    """Two threads wait for each other: one alone would wait for ever."""
    meeting = threading.Barrier(2, timeout=10)

    def make(item: int) -> int:
        meeting.wait()
        return item * item

    assert list(ahead(make, [(item, 1) for item in range(6)])) == [0, 1, 4, 9, 16, 25]


def test_no_more_bytes_are_begun_than_are_allowed() -> None:
    begun: list[int] = []

    def make(item: int) -> int:
        begun.append(item)
        return item

    sizes = [(item, 2 * MIB) for item in range(6)]
    with closing(ahead(make, sizes, max_bytes=4 * MIB)) as results:
        for taken, _ in enumerate(results):
            assert len(begun) <= taken + 2  # the one that is used, and one beside it
    assert begun == list(range(6))


def test_a_result_above_the_bound_has_one_other_beside_it() -> None:
    """The next one is made while it is used, and none after that."""
    begun: list[int] = []
    second = threading.Event()

    def make(item: int) -> int:
        begun.append(item)
        if item == 1:
            second.set()
        return item

    sizes = [(item, 9 * MIB) for item in range(6)]
    with closing(ahead(make, sizes, max_bytes=4 * MIB)) as results:
        for taken, _ in enumerate(results):
            assert len(begun) <= taken + 2
            if taken == 0:
                assert second.wait(timeout=10)
    assert begun == list(range(6))


def test_an_error_comes_in_the_place_of_its_result() -> None:
    def make(item: int) -> int:
        if item == 1:
            raise ValueError("one is damaged")
        return item

    results = ahead(make, [(item, 1) for item in range(3)])
    assert next(results) == 0
    with pytest.raises(ValueError, match="one is damaged"):
        next(results)


def test_closing_ends_the_threads() -> None:
    with closing(ahead(lambda item: item, [(item, 1) for item in range(9)])) as results:
        assert next(results) == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]
