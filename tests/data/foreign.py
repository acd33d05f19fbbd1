"""Sets as Megatron's own tools write them, and reading them as a new process does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_fdd.data import token_ids


def foreign(prefix: Path, documents: list[list[int]], dtype: type[np.number] = np.int32) -> str:
    """Write a set as Megatron's own tools write it."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for ids in documents:
        builder.add_document(ids, [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def forget() -> None:
    """Forget what this process has read, as a new one."""
    token_ids._kept.cache_clear()
    token_ids._sample.cache_clear()
