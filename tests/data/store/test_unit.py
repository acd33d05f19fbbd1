"""Units: where they begin and end in a sample, and their keys, which are frozen."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_fdd.data.store.unit import as_ids, unit_key, units_of

KEY_OF_1_2_3 = "951c3b18bea3e39e7338017b71dc1f4f"


def sample(token: str, loss: str, edges: list[int] | None = None) -> dict[str, torch.Tensor]:
    """Return a sample with masks of 0s and 1s, and the boundaries of a packed one, as `packing.py` pads them."""
    masks = {
        name: torch.tensor([float(each) for each in text])
        for name, text in (("token_mask", token), ("loss_mask", loss))
    }
    if edges is None:
        return masks
    padded = edges + [len(token)] * (len(token) + 1 - len(edges))
    return {**masks, "cu_seqlens": torch.tensor(padded, dtype=torch.int32)}


CASES = {
    "whole": (sample("1111", "1111"), [(0, 4)]),
    "padding behind": (sample("1110000", "1100000"), [(0, 3)]),
    "no loss on a prompt": (sample("111111", "000110"), [(0, 6)]),
    "a hole in both masks": (sample("110011", "110000"), [(0, 6)]),
    "padding in front belongs to the unit": (sample("0011", "0011"), [(0, 4)]),
    "a label behind an end token that is also the padding": (sample("11000", "11100"), [(0, 3)]),
    "all padding": (sample("0000", "0000"), []),
    "one token": (sample("1000", "0000"), [(0, 1)]),
    "packed": (sample("111111", "110111", [0, 2, 6]), [(0, 2), (2, 6)]),
    "packed, padding behind each": (sample("11011000", "10010000", [0, 3, 6, 8]), [(0, 2), (3, 5)]),
    "packed, a document of padding alone": (sample("110001", "110001", [0, 2, 5, 6]), [(0, 2), (5, 6)]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_unit_is_what_attention_spans_without_the_padding_behind(name: str) -> None:
    given, wanted = CASES[name]
    assert units_of(given) == wanted


def test_the_key_of_ids_is_frozen() -> None:
    """Another key would make every store that there is useless."""
    assert unit_key([1, 2, 3]).hex() == KEY_OF_1_2_3
    assert unit_key(np.array([1, 2, 3], np.int64)) == unit_key(torch.tensor([1, 2, 3])) == unit_key([1, 2, 3])
    assert unit_key(np.arange(10)[1:4]) == unit_key(np.array([1, 9, 2, 9, 3])[::2]) == unit_key([1, 2, 3])


def test_other_ids_have_other_keys() -> None:
    ids = [[1, 2, 3], [3, 2, 1], [1, 2], [1, 2, 3, 0], [258], [2, 1], []]
    assert len({unit_key(each) for each in ids}) == len(ids)


def test_ids_are_little_endian_32_bits() -> None:
    assert as_ids([1, 256]).tobytes() == bytes([1, 0, 0, 0, 0, 1, 0, 0])
