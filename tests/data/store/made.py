"""Stores of made-up features for tests: small, and written by the package's own writer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_fdd.data.store.identity import StoreIdentity, write_identity
from megatron_fdd.data.store.lens import StoredExtras, StoredLens, StoredNorm, write_stored_lens
from megatron_fdd.data.store.segment import Bytes, SegmentWriter, segment_names, segment_path
from megatron_fdd.data.store.store import Store
from megatron_fdd.data.store.unit import as_ids

IDENTITY = StoreIdentity(
    engine="megatron",
    teacher="a teacher",
    weights="12ab",
    final_norm="34cd",
    architecture="56ef",
    num_layers=6,
    hidden_size=5,
    vocab_size=2050,
    blocks=[2, 4, 6],
    form="bf16",
    token_bytes=10,
    ran={"attention": "sdpa", "dtype": "bfloat16"},
)
OTHER = replace(IDENTITY, weights="of another teacher")
T, P = len(IDENTITY.blocks), IDENTITY.token_bytes

Unit = tuple[NDArray[np.int32], Bytes]


def unit(length: int, seed: int = 0) -> Unit:
    """Return ids [S] and packed states [T, S, P] that only this length and seed have."""
    random = np.random.default_rng((length, seed))
    return as_ids(random.integers(0, 2000, length)), random.integers(0, 256, (T, length, P), np.uint8)


def write(path: Path, *segments: Sequence[Unit], identity: StoreIdentity = IDENTITY) -> list[str]:
    """Write each list of units as one segment; return the names of the new ones, in this order."""
    write_identity(path, identity)
    names = []
    for units in segments:
        before = set(segment_names(path))
        writer = SegmentWriter(path, identity.digest, T, P, most_units=len(units))
        for ids, states in units:
            writer.add(ids, states)
        names += set(segment_names(path)) - before
    return names


def write_lens(path: Path, *, bias: bool = True, rows: int = IDENTITY.vocab_size) -> StoredLens:
    """Write the lens of a store, and return it; `bias`: its norm and its head have one, and its logits a cap."""
    random = torch.Generator().manual_seed(3)
    width = IDENTITY.hidden_size
    norm = StoredNorm(
        "layer", torch.randn(width, generator=random), torch.randn(width) if bias else None, 1e-5
    )
    extras = StoredExtras(torch.randn(rows, generator=random), 30.0) if bias else StoredExtras()
    lens = StoredLens(norm, torch.randn(rows, width, generator=random).bfloat16(), 1e-3, extras)
    write_stored_lens(path, lens)
    return lens


def opened(path: Path) -> Store:
    return Store.open(path, "--store")


def read_whole(store: Store, ids: NDArray[np.int32]) -> Bytes:
    return store.read(ids, range(T), 0, len(ids))


def assert_holds(store: Store, units: Sequence[Unit]) -> None:
    """Check that a store gives exactly what was written."""
    for ids, states in units:
        np.testing.assert_array_equal(read_whole(store, ids), states)


def flip(path: Path, at: int, bit: int = 0) -> None:
    """Flip one bit of a file; `at` counts bytes, from the end if it is negative."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def file_of(path: Path, name: str) -> Path:
    return segment_path(path, name)
