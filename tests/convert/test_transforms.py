"""Comparison of the layouts with their definition, which is written out element by element."""

from __future__ import annotations

from operator import is_

import pytest
import torch

from megatron_fdd.convert.families.transforms import (
    Alternating,
    GroupedQkv,
    Same,
    Stacked,
    Transposed,
    join_blocks,
    split_blocks,
)


@pytest.mark.parametrize("width", [(), (5,)], ids=["bias", "weight"])
@pytest.mark.parametrize(("groups", "queries_per_group", "head_dim"), [(3, 2, 5), (1, 4, 2), (4, 1, 3)])
def test_grouped_qkv(groups: int, queries_per_group: int, head_dim: int, width: tuple[int, ...]) -> None:
    heads = groups * queries_per_group
    query = torch.randn(heads * head_dim, *width)
    key, value = (torch.randn(groups * head_dim, *width) for _ in range(2))
    transform = GroupedQkv(queries_per_group, head_dim)
    expected = []
    for group in range(groups):
        for head in range(group * queries_per_group, (group + 1) * queries_per_group):
            expected += list(query[head * head_dim : (head + 1) * head_dim])
        for tensor in (key, value):
            expected += list(tensor[group * head_dim : (group + 1) * head_dim])
    joined = transform.join([query, key, value])
    assert torch.equal(joined, torch.stack(expected))
    for part, original in zip(transform.split(joined), (query, key, value), strict=True):
        assert torch.equal(part, original)


def test_stacked_and_same() -> None:
    gate, up = torch.randn(4, 3), torch.randn(4, 3)
    joined = Stacked(2).join([gate, up])
    assert torch.equal(joined[:4], gate)
    assert torch.equal(joined[4:], up)
    assert all(map(torch.equal, Stacked(2).split(joined), (gate, up)))
    assert Same().split(Same().join([gate]))[0] is gate


def test_blocks_of_stacked_parts_are_not_copied() -> None:
    gate, up = torch.randn(4, 3), torch.randn(4, 3)
    assert all(map(is_, join_blocks(Stacked(2), [gate, up]), (gate, up)))
    assert all(map(is_, split_blocks(Stacked(2), [gate, up]), (gate, up)))
    for rows in ([8], [3, 5], [2, 2, 4]):
        parts = split_blocks(Stacked(2), torch.cat([gate, up]).split(rows))
        assert all(map(torch.equal, parts, (gate, up))), rows
    transform = GroupedQkv(2, 1)
    (joined,) = join_blocks(transform, [gate, gate[:2], up[:2]])
    assert torch.equal(split_blocks(transform, [joined[:1], joined[1:]])[0], gate)


def test_alternating_columns_of_a_transposed_matrix() -> None:
    stored = torch.randn(3, 8)  # [in, gate 0, up 0, gate 1, ...]
    transform = Transposed(Alternating())
    joined = transform.join([stored])
    expected = [stored[:, column] for column in (0, 2, 4, 6, 1, 3, 5, 7)]
    assert torch.equal(joined, torch.stack(expected))
    assert torch.equal(transform.split(joined)[0], stored)
