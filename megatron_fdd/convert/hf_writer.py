"""Writing a Hugging Face model folder in shards, and folders that are complete or not there."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from megatron_fdd.convert.hf_folder import INDEX_FILE, SINGLE_FILE, write_json

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(text: str) -> int:
    """ "5GB" -> bytes, with decimal units as in transformers.

    Raises:
        ValueError: anything else than a positive number and B, KB, MB, GB or TB.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B?)", text.strip().upper())
    size = int(float(match[1]) * _UNITS.get(match[2], 0)) if match else 0
    if size < 1:
        raise ValueError(
            f"shard size {text!r} is not understood; write it as 5GB, 500MB or a number of bytes"
        )
    return size


def unfinished_name(final: Path) -> Path:
    """Where a folder lies until it is complete: a hidden sibling, so that the last step is a rename."""
    return final.with_name(f".{final.name}.incomplete")


def check_new_folder(final: Path) -> None:
    """ValueError unless nothing, or an empty folder, is at `final`."""
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise ValueError(f"{final} exists already and is not empty; give a new folder or remove it first")


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A folder to write into that appears as `final` only when the block has ended well.

    A killed process leaves the hidden `.NAME.incomplete` behind, which the next run replaces.

    Raises:
        ValueError: `final` exists and is not empty.
    """
    check_new_folder(final)
    unfinished = unfinished_name(final)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        if final.exists():
            final.rmdir()
        unfinished.rename(final)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


class ShardWriter:
    """Tensors in the order given, at most one shard of them in memory.

    Files are named as Hugging Face names them; that needs their number, so `close()` renames them and writes
    the index. One shard has the plain name and no index.
    """

    def __init__(self, folder: Path, max_shard_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self.total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor; a tensor larger than a shard gets a shard of its own."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self._max_bytes:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += size
        self.total_bytes += size

    def _flush(self) -> None:
        save_file(self._pending, self._part(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _part(self, index: int) -> Path:
        return self._folder / f"part-{index:05d}.safetensors"

    def close(self) -> int:
        """Write what is left, the final names and the index; returns the number of tensors."""
        if self._pending:
            self._flush()
        count = len(self._shards)
        if count == 1:
            self._part(0).rename(self._folder / SINGLE_FILE)
            return len(self._shards[0])
        weight_map = {}
        for index, names in enumerate(self._shards):
            final = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            self._part(index).rename(self._folder / final)
            weight_map.update(dict.fromkeys(names, final))
        index_file = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        write_json(self._folder / INDEX_FILE, index_file)
        return len(weight_map)
