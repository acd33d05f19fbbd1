"""The rule that a text begins with at most one start token."""

from __future__ import annotations

import pytest

from megatron_fdd.data.tokenizer_identity import without_second_start


@pytest.mark.parametrize(
    ("ids", "bos", "expected"),
    [
        ([1, 1, 3, 4], 1, [1, 3, 4]),
        ([1, 1, 1], 1, [1]),
        ([1, 3, 1, 1], 1, [1, 3, 1, 1]),  # a later one belongs to the text
        ([3, 1], 1, [3, 1]),
        ([], 1, []),
        ([0, 0, 2], None, [0, 0, 2]),
        ([0, 0, 2], -1, [0, 0, 2]),
        ([0, 0, 2], 0, [0, 2]),
    ],
)
def test_a_second_start_token_is_left_out(ids: list[int], bos: int | None, expected: list[int]) -> None:
    assert without_second_start(ids, bos) == expected
