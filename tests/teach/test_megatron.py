"""The micro-batches of the engine `megatron`, without ranks."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from megatron_fdd.teach.megatron import MegatronEngine
from megatron_fdd.teach.megatron_teacher import check_capacity


@pytest.mark.parametrize("num_units", [1, 7, 8, 9, 20])
def test_their_number_does_not_depend_on_the_units(num_units: int) -> None:
    """Replicas with other numbers of units may share experts: one would wait for the other."""
    engine = object.__new__(MegatronEngine)
    engine._topology = SimpleNamespace(num_stages=2)  # type: ignore[assignment]
    engine._model = SimpleNamespace(config=SimpleNamespace(fp8=None))  # type: ignore[assignment]
    engine._cut = 2
    units = [np.arange(1, 4 + number, dtype=np.int32) for number in range(num_units)]
    samples = engine._samples(units)
    assert len(samples) == 8
    rows = [row.numpy() for sample in samples for row in sample["tokens"]]
    for ids, row in zip(units, rows, strict=False):
        assert np.array_equal(row[: len(ids)], ids)
    assert not any(row.any() for row in rows[num_units:])
    masks = [row for sample in samples for row in sample["token_mask"]]
    lengths = [*map(len, units), *[0] * (len(rows) - num_units)]
    assert [int(mask.sum()) for mask in masks] == lengths
    assert all(mask[:length].all() for mask, length in zip(masks, lengths, strict=True))


def test_experts_that_drop_tokens_are_refused() -> None:
    """What they drop depends on the batch, so that a unit would have no states of its own."""
    config = SimpleNamespace(teacher_load="mixture")
    check_capacity(SimpleNamespace(config=config, teacher=SimpleNamespace(moe_expert_capacity_factor=None)))
    with pytest.raises(
        ValueError, match="--teacher mixture: its experts drop tokens .* 1.5, .*--teacher-load"
    ):
        check_capacity(
            SimpleNamespace(config=config, teacher=SimpleNamespace(moe_expert_capacity_factor=1.5))
        )
