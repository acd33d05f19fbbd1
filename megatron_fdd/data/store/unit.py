"""Attention units: runs of token ids with attention among them, and the key under which their features lie."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

KEY_BYTES = 16
_PERSON = b"fdd-unit"


def unit_key(ids: ArrayLike) -> bytes:
    """Return the key of a unit: BLAKE2b of its ids as little-endian int32, 16 bytes."""
    return hashlib.blake2b(as_ids(ids).tobytes(), digest_size=KEY_BYTES, person=_PERSON).digest()


def as_ids(ids: ArrayLike) -> NDArray[np.int32]:
    """Return token ids in the type in which they are hashed and stored."""
    return np.ascontiguousarray(ids, "<i4")


def units_of(sample: Mapping[str, Tensor]) -> list[tuple[int, int]]:
    """Find the units of a sample of `data/datasets.py`: where each begins and ends, in order.

    A packed sample has one for each document, another sample one. Padding behind a unit is not part of it, and what is
    padding alone is no unit: there neither the input nor the label counts.
    """
    counts_S = (sample["token_mask"].numpy() > 0) | (sample["loss_mask"].numpy() > 0)
    edges = [0, len(counts_S)]
    if "cu_seqlens" in sample:
        edges = np.unique(sample["cu_seqlens"].numpy()).tolist()
    units = []
    for first, last in pairwise(edges):
        used = np.flatnonzero(counts_S[first:last])
        if len(used):
            units.append((first, first + int(used[-1]) + 1))
    return units
