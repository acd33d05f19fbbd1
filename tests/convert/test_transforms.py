"""Comparison of the layouts with their definition, which is written out element by element."""

from __future__ import annotations

import pytest
import torch

from megatron_fdd.convert.families.transforms import (
    Alternating,
    GroupedQkv,
    Same,
    Stacked,
    Transposed,
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


def test_alternating_columns_of_a_transposed_matrix() -> None:
    stored = torch.randn(3, 8)  # [in, gate 0, up 0, gate 1, ...]
    transform = Transposed(Alternating())
    joined = transform.join([stored])
    expected = [stored[:, column] for column in (0, 2, 4, 6, 1, 3, 5, 7)]
    assert torch.equal(joined, torch.stack(expected))
    assert torch.equal(transform.split(joined)[0], stored)
