"""Units that a store lacks, counted by one process or by several."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_fdd.data.datasets import Sample
from megatron_fdd.data.store.coverage import Source, find_missing, joined
from tests.data.store.made import opened, unit, write

LENGTHS = (3, 5, 3, 9, 5, 7, 3)  # some units come again


def sample(length: int) -> Sample:
    ids, _ = unit(length)
    mask = torch.ones(length)
    return {"tokens": torch.from_numpy(ids.astype(np.int64)), "loss_mask": mask, "token_mask": mask}


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 9])
def test_several_ranks_find_what_one_finds(num_ranks: int, tmp_path: Path) -> None:
    write(tmp_path, [unit(5)])
    index = opened(tmp_path).index
    sources = [Source("training", [sample(each) for each in LENGTHS], len(LENGTHS))]
    shares = [find_missing(sources, index, deal=(rank, num_ranks)) for rank in range(num_ranks)]
    found = joined(shares)
    assert [(each.sample, each.last) for each in found.missing.values()] == [(0, 3), (3, 9), (5, 7)]
    assert found.missing_tokens == 19
    assert (found.num_read, found.tokens_read, len(found.keys)) == (7, sum(LENGTHS), 4)
    assert found.example is not None
    assert found.example.sample == 0


def test_stores_that_grew_differ(tmp_path: Path) -> None:
    write(tmp_path, [unit(5)])
    before = opened(tmp_path).index.digest
    assert opened(tmp_path).index.digest == before
    write(tmp_path, [unit(6)])
    assert opened(tmp_path).index.digest != before


def test_nothing_to_read_has_no_example(tmp_path: Path) -> None:
    write(tmp_path, [unit(5)])
    assert joined([find_missing([], opened(tmp_path).index)]).example is None
