"""What one rank reads of a sample: its positions in Megatron's order, its blocks, and zeros where no unit is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from megatron_fdd.data.store.store import Store
from megatron_fdd.data.store.taught import FEATURES, FeatureReader, TaughtDataset, rank_ranges
from megatron_fdd.data.store.unit import as_ids, units_of
from tests.data.store.made import IDENTITY, P, opened, unit, write

LENGTH = 96
LAYOUTS = [(c, t) for c in (1, 2, 3, 4) for t in (1, 2, 4) if LENGTH % (2 * c * t) == 0]


def positions(ranges: tuple[tuple[int, int], ...]) -> list[int]:
    return [each for first, last in ranges for each in range(first, last)]


@pytest.mark.parametrize(("context", "tensor"), LAYOUTS)
def test_ranges_are_megatrons_zig_zag_and_then_the_sequence_parallel_chunk(
    monkeypatch: pytest.MonkeyPatch, context: int, tensor: int
) -> None:
    monkeypatch.setattr("torch.distributed.get_world_size", lambda _: context)
    for rank in range(context):
        batch: dict[str, Tensor] = {"tokens": torch.arange(LENGTH)[None]}
        monkeypatch.setattr("torch.distributed.get_rank", lambda _, rank=rank: rank)
        own = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False)["tokens"][0]
        for part in range(tensor):
            ranges = rank_ranges(LENGTH, context=(rank, context), sequence=(part, tensor))
            assert positions(ranges) == own.chunk(tensor)[part].tolist()
            assert all(first < last for first, last in ranges)


def test_every_position_is_read_once() -> None:
    found = [
        each
        for rank in range(4)
        for part in range(2)
        for each in positions(rank_ranges(64, context=(rank, 4), sequence=(part, 2)))
    ]
    assert sorted(found) == list(range(64))


def _samples() -> dict[str, dict[str, Tensor]]:
    """Return samples of 96 tokens: whole, padded, packed with padding behind documents, and nothing but padding."""
    documents = [unit(length)[0] for length in (20, 3, 40, 1)]
    whole = torch.from_numpy(unit(LENGTH)[0]).long()
    ones, packed, mask = torch.ones(LENGTH), torch.zeros(LENGTH, dtype=torch.int64), torch.zeros(LENGTH)
    edges, at = [0], 0
    for ids, room in zip(documents, (20, 6, 45, 1), strict=True):
        packed[at : at + len(ids)] = torch.from_numpy(ids)
        mask[at : at + len(ids)] = 1
        at += room
        edges.append(at)
    boundaries = torch.tensor(edges + [LENGTH] * (LENGTH + 1 - len(edges)), dtype=torch.int32)
    padded_mask = (torch.arange(LENGTH) < 70).float()
    return {
        "whole": {"tokens": whole, "token_mask": ones, "loss_mask": ones},
        "padded": {
            "tokens": whole * padded_mask.long(),
            "token_mask": padded_mask,
            "loss_mask": (torch.arange(LENGTH) < 69).float(),
        },
        "packed": {
            "tokens": packed,
            "token_mask": mask,
            "loss_mask": torch.zeros(LENGTH),
            "cu_seqlens": boundaries,
        },
        "padding": {
            "tokens": whole,
            "token_mask": torch.zeros(LENGTH),
            "loss_mask": torch.zeros(LENGTH),
        },
    }


SAMPLES = _samples()


def expected(sample: dict[str, Tensor]) -> np.ndarray:
    """Return the features of a whole sample, position by position: uint8 [T, S, P]."""
    found = np.zeros((len(IDENTITY.blocks), LENGTH, P), np.uint8)
    for first, last in units_of(sample):
        states = STATES[sample["tokens"][first:last].int().numpy().tobytes()]
        for position in range(first, last):
            found[:, position] = states[:, position - first]
    return found


STATES = {}
for _sample in SAMPLES.values():
    for _first, _last in units_of(_sample):
        _ids = as_ids(_sample["tokens"][_first:_last].numpy())
        STATES[_ids.tobytes()] = unit(len(_ids), 99)[1]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    write(tmp_path, [(np.frombuffer(ids, np.int32), states) for ids, states in STATES.items()])
    return opened(tmp_path)


def read(reader: FeatureReader, sample: dict[str, Tensor]) -> Tensor:
    return reader.read({name: value[None] for name, value in sample.items()})[0]


@pytest.mark.parametrize("name", SAMPLES)
def test_a_rank_reads_its_blocks_at_its_positions(store: Store, name: str) -> None:
    sample = SAMPLES[name]
    wanted = expected(sample)
    for blocks, numbers in (((2, 4, 6), [0, 1, 2]), ((6,), [2]), ((2, 6), [0, 2])):
        for context, tensor in LAYOUTS:
            for rank in range(context * tensor):
                ranges = rank_ranges(
                    LENGTH, context=(rank // tensor, context), sequence=(rank % tensor, tensor)
                )
                found = read(FeatureReader(store, blocks, ranges), sample)
                assert found.dtype == torch.uint8
                np.testing.assert_array_equal(found.numpy(), wanted[numbers][:, positions(ranges)])


def test_a_taught_dataset_is_the_dataset_with_features(store: Store) -> None:
    class Samples(list[dict[str, Tensor]]):
        split = "train"

    reader = FeatureReader(store, (2, 6), ((0, LENGTH),))
    dataset = TaughtDataset(Samples(SAMPLES.values()), reader)
    assert (len(dataset), dataset.split, hasattr(dataset, "index_split")) == (4, "train", False)  # type: ignore[attr-defined]
    for number, sample in enumerate(SAMPLES.values()):
        found = dataset[number]
        assert found.keys() == {*sample, FEATURES}
        assert torch.equal(found[FEATURES], read(reader, sample))
        assert all(found[each] is sample[each] for each in sample)
    assert all(FEATURES not in sample for sample in SAMPLES.values())


def test_a_sample_with_a_unit_that_is_not_there_is_refused(store: Store) -> None:
    sample = {**SAMPLES["whole"], "tokens": SAMPLES["whole"]["tokens"].flip(0)}
    with pytest.raises(ValueError, match=r"has no unit of the 96 tokens .*fdd teach"):
        read(FeatureReader(store, (6,), ((0, 8),)), sample)


def test_a_rank_whose_positions_a_unit_does_not_touch_does_not_look_for_it(store: Store) -> None:
    sample = {**SAMPLES["padded"], "tokens": SAMPLES["padded"]["tokens"].flip(0)}
    assert not read(FeatureReader(store, (6,), ((70, LENGTH),)), sample).any()
