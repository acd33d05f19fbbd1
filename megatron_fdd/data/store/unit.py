"""Attention units: runs of token ids with attention among them, and the key under which their features lie."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

KEY_BYTES = 16
_PERSON = b"fdd-unit"
_READ = ("token_mask", "loss_mask", "cu_seqlens")


def unit_key(ids: ArrayLike) -> bytes:
    """Return the key of a unit: BLAKE2b of its ids as little-endian int32, 16 bytes."""
    return hashlib.blake2b(as_ids(ids).data, digest_size=KEY_BYTES, person=_PERSON).digest()


def as_ids(ids: ArrayLike) -> NDArray[np.int32]:
    """Return token ids in the type in which they are hashed and stored."""
    return np.ascontiguousarray(ids, "<i4")


def units_of(sample: Mapping[str, Tensor]) -> list[tuple[int, int]]:
    """Find the units of a sample of `data/datasets.py`: where each begins and ends, in order.

    A packed sample has one for each document, another sample one. Padding behind a unit is not part of it, and what is
    padding alone is no unit: there neither the input nor the label counts.
    """
    (units,) = units_of_rows({name: value[None] for name, value in sample.items() if name in _READ})
    return units


def units_of_rows(batch: Mapping[str, Tensor]) -> Iterator[list[tuple[int, int]]]:
    """Yield the units of each sample of a batch, as `units_of` finds them."""
    token_mask_BS, loss_mask_BS = batch["token_mask"].numpy(), batch["loss_mask"].numpy()
    if "cu_seqlens" in batch:
        edges_B = [np.unique(edges) for edges in batch["cu_seqlens"].numpy()]
    else:
        edges_B = [np.array([0, token_mask_BS.shape[1]])] * len(token_mask_BS)
    for token_mask, loss_mask, edges in zip(token_mask_BS, loss_mask_BS, edges_B, strict=True):
        if len(edges) == 2 and token_mask[-1] > 0:
            yield [(0, len(token_mask))]
            continue
        counts_S = (token_mask > 0) | (loss_mask > 0)
        positions = np.where(counts_S, np.arange(len(counts_S)), -1)[: edges[-1]]
        # The last position of each document that counts, or -1.
        last_D = np.maximum.reduceat(positions, edges[:-1])
        starts = zip(edges[:-1].tolist(), last_D.tolist(), strict=True)
        yield [(first, last + 1) for first, last in starts if last >= 0]
