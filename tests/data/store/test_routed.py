"""Samples that say whose they are, and features that are read from the store of the sample's own teacher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate

from megatron_fdd.data.full_validation import FilledDataset
from megatron_fdd.data.store.coverage import Source, Unit
from megatron_fdd.data.store.identity import write_identity
from megatron_fdd.data.store.origin import whereabouts
from megatron_fdd.data.store.routed import PickedSamples, RoutedDataset, RoutedReader, picked
from megatron_fdd.data.store.segment import SegmentWriter
from megatron_fdd.data.store.taught import FEATURES, FeatureReader, TaughtDataset
from tests.data.store.made import IDENTITY, opened, unit, write

LENGTH = 8
# Wider and with fewer blocks than the other store's.
OTHER = replace(IDENTITY, blocks=[6], token_bytes=40, weights="of another teacher")


class Texts:
    """A data set of ours, as far as it is looked at."""

    def __init__(self, prefix: str, seeds: list[int]) -> None:
        self.dataset = SimpleNamespace(path_prefix=prefix)
        self.units = [unit(LENGTH, seed) for seed in seeds]

    def __len__(self) -> int:
        return len(self.units)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ones = torch.ones(LENGTH)
        return {
            "tokens": torch.from_numpy(self.units[index][0]).long(),
            "token_mask": ones,
            "loss_mask": ones,
        }


class Blend(Texts):
    """Megatron's blend, as far as it is looked at."""

    def __init__(self, datasets: list[Texts], order: list[tuple[int, int]]) -> None:
        self.datasets, self.dataset_index = datasets, np.array([number for number, _ in order], np.int16)
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, sample = self.order[index]
        return {"dataset_id": self.dataset_index[index], **self.datasets[number][sample]}


def blend(monkeypatch: Any) -> Blend:
    monkeypatch.setattr("megatron_fdd.data.store.routed.BlendedDataset", Blend)
    code, maths = Texts("code", [1, 2]), Texts("maths", [3])
    return Blend([code, maths], [(0, 0), (1, 0), (0, 1)])


def test_a_sample_says_whose_it_is(monkeypatch: Any) -> None:
    routed = RoutedDataset(FilledDataset(blend(monkeypatch)), {"maths": 0, "code": 1})
    assert [int(routed[index]["teacher"]) for index in (0, 1, 2, 3)] == [1, 0, 1, 1]
    assert RoutedDataset(Texts("maths", [5]), {"maths": 0})[0]["teacher"] == 0
    sources = [Source("training", routed, 2), Source("validation", Texts("maths", [5]), 1)]
    own, none = picked(sources, {"maths": 0, "code": 1}, 0)
    assert (own.num_samples, own.dataset.numbers.tolist(), none.num_samples) == (1, [1], 1)
    other, left = picked(sources, {"maths": 0, "code": 1}, 1)
    assert (other.dataset.numbers.tolist(), left.num_samples) == ([0], 0)
    assert own.dataset.digest != other.dataset.digest


def test_a_picked_sample_is_named_by_its_number_in_the_data() -> None:
    chosen = PickedSamples(Texts("code", [1]), np.array([4, 7]))
    place = whereabouts(Source("training", chosen, 2), Unit(0, 1, 0, 3))
    assert place == "training sample 7, tokens 0 to 2"


def test_features_are_those_of_the_samples_own_teacher(tmp_path: Path, monkeypatch: Any) -> None:
    data = blend(monkeypatch)
    write(tmp_path / "code", data.datasets[0].units)
    [(ids, _)] = data.datasets[1].units
    states = np.random.default_rng(1).integers(0, 256, (1, LENGTH, 40), np.uint8)
    write_identity(tmp_path / "maths", OTHER)
    SegmentWriter(tmp_path / "maths", OTHER.digest, 1, 40, most_units=1).add(ids, states)
    ranges = ((2, 5),)
    readers = (
        FeatureReader(opened(tmp_path / "code"), (2, 6), ranges),
        FeatureReader(opened(tmp_path / "maths"), (6,), ranges),
    )
    reader = RoutedReader(readers)
    assert reader.shape(3) == (3, 3 * 40)
    routed = RoutedDataset(data, {"code": 0, "maths": 1})
    batch = default_collate([routed[index] for index in range(3)])
    found, into = reader.read(batch).numpy(), np.zeros((3, 120), np.uint8)
    reader.read(batch, into)
    for row, (number, sample) in enumerate(data.order):
        wanted = states[:, 2:5] if number else data.datasets[0].units[sample][1][[0, 2], 2:5]
        assert np.array_equal(found[row, : wanted.size], wanted.reshape(-1))
        assert np.array_equal(into[row, : wanted.size], wanted.reshape(-1))
        taught = TaughtDataset(routed, reader)[row][FEATURES]
        assert np.array_equal(taught.numpy()[: wanted.size], wanted.reshape(-1))
