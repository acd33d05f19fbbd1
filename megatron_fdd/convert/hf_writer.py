"""The writer of a Hugging Face model folder in shards, and folders that appear only when they are complete."""

from __future__ import annotations

import fcntl
import itertools
import json
import math
import os
import re
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_fdd.convert.checksums import bytes_of, check_finite, digest
from megatron_fdd.convert.families.family import slice_name, whole_name
from megatron_fdd.convert.hf_folder import INDEX_FILE, SINGLE_FILE
from megatron_fdd.convert.stored_tensor import NAME_OF_DTYPE
from megatron_fdd.host.disk import check_folder, check_no_link, flushed_behind, large_file, naming, writing
from megatron_fdd.host.json_file import write_json

# So many tensors are hashed side by side.
_HASHERS = 2
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(text: str) -> int:
    """Parse a size such as "5GB" into bytes, with decimal units as in transformers.

    Raises:
        ValueError: the text is not a positive number followed by B, KB, MB, GB or TB.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B?)", text.strip().upper())
    size = int(float(match[1]) * _UNITS.get(match[2], 0)) if match else 0
    if size < 1:
        raise ValueError(
            f"shard size {text!r} is not understood; write it as 5GB, 500MB or a number of bytes"
        )
    return size


def unfinished_name(final: Path) -> Path:
    """Return the path of a folder until it is complete: a hidden sibling, so that the last step is a rename."""
    real = Path(os.path.realpath(final))
    return real.with_name(f".{real.name}.incomplete")


def check_new_folder(final: Path, flag: str) -> None:
    """Refuse `final`, the value of `flag`, unless it can be made, or is an empty folder that can be replaced."""
    real = Path(os.path.realpath(final))
    if real.exists() and (not real.is_dir() or any(real.iterdir())):
        raise ValueError(
            f"{flag} {final}: exists already and is not empty; give a new folder or remove it first"
        )
    if os.path.ismount(real):
        raise ValueError(f"{flag} {final}: a mount point, which cannot be replaced; give a folder inside it")
    check_folder(flag, final, real.parent)


@contextmanager
def new_folder(final: Path, flag: str) -> Iterator[Path]:
    """Yield a folder to write into; it becomes `final` only after the block ends well, with everything on disk.

    A killed process leaves the hidden `.NAME.incomplete` behind, which the next run replaces.

    Raises:
        ValueError: `final`, the value of `flag`, exists and is not empty, or cannot be written, or another process is
            writing it.
    """
    check_new_folder(final, flag)
    unfinished, real = unfinished_name(final), Path(os.path.realpath(final))
    with writing(flag, final):
        lock = _take(unfinished, f"{flag} {final}")
        try:
            with writing(flag, final), naming(unfinished, final):  # tells the room before there is more again
                yield unfinished
                for path in [*unfinished.rglob("*"), unfinished]:
                    _to_disk(path)
                if real.exists():
                    real.rmdir()
                unfinished.rename(real)
                _to_disk(real.parent)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        finally:
            os.close(lock)


def _take(folder: Path, told: str) -> int:
    """Make a folder, or empty what a killed process left; return the descriptor whose lock keeps others out.

    A file system without locks keeps nobody out.

    Raises:
        ValueError: a living process is writing there.
    """
    check_no_link(folder, told)
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise ValueError(
            f"{told}: another process is writing it; wait for its end, or give a new folder"
        ) from error
    except OSError:
        pass
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return lock


def _to_disk(path: Path) -> None:
    """Force a file or folder to disk, so that it survives a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor, or a slice of one (`slice_name`), to be written, before there is any data."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file: its final name and its tensors in order."""

    file: str
    tensors: tuple[TensorSpec, ...]

    @property
    def num_bytes(self) -> int:
        """Size of its tensors."""
        return sum(spec.num_bytes for spec in self.tensors)


def plan_shards(tensors: Iterable[TensorSpec], max_shard_bytes: int) -> list[Shard]:
    """Divide tensors, in the given order, into as few files as `max_shard_bytes` allows, with Hugging Face's names.

    A tensor larger than a shard gets its own shard. The plan depends only on the specs of the tensors, so that every
    rank makes the same plan, for any number of ranks. The slices of a tensor follow one another, in one file.
    """
    files: list[list[TensorSpec]] = []
    size = 0
    for _, specs in itertools.groupby(tensors, lambda spec: whole_name(spec.name)):
        whole = list(specs)
        num_bytes = sum(spec.num_bytes for spec in whole)
        if not files or size + num_bytes > max_shard_bytes:
            files.append([])
            size = 0
        files[-1] += whole
        size += num_bytes
    if len(files) == 1:
        return [Shard(SINGLE_FILE, tuple(files[0]))]
    return [
        Shard(f"model-{index + 1:05d}-of-{len(files):05d}.safetensors", tuple(file))
        for index, file in enumerate(files)
    ]


def write_shard(
    folder: Path, shard: Shard, tensors: Iterable[Tensor], remedy: str | None = None
) -> Iterator[tuple[TensorSpec, str]]:
    """Write one safetensors file, two tensors in memory at a time: one is written while the other is still hashed.

    The format is an 8-byte little-endian length, a JSON header of that length, and the data back to back
    (safetensors' own `save_file` wants all tensors at once).

    Args:
        tensors: the data, in the shard's order, on the CPU.
        remedy: what to do about values that are not finite, which are refused; without it they are not looked at.

    Yields:
        The spec of each tensor after it is written, and the checksum of its bytes.

    Raises:
        ValueError: values are not finite. OSError: the file cannot be written.
    """
    header = {"__metadata__": {"format": "pt"}, **_entries(shard.tensors)}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data begins aligned
    with (
        ThreadPoolExecutor(_HASHERS) as hashers,
        large_file(folder / shard.file) as file,
        flushed_behind(file),
    ):
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        written: deque[tuple[TensorSpec, Future[str]]] = deque()
        for spec, tensor in zip(shard.tensors, tensors, strict=True):
            assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape), spec
            raw = bytes_of(tensor)
            written.append((spec, hashers.submit(_checked_digest, spec.name, tensor, remedy)))
            file.write(raw)
            if len(written) == _HASHERS:
                done, hashed = written.popleft()
                yield done, hashed.result()
        for done, hashed in written:
            yield done, hashed.result()


def _checked_digest(name: str, tensor: Tensor, remedy: str | None) -> str:
    """Return the checksum of a tensor, whose values must be finite if there is a remedy."""
    if remedy is not None:
        check_finite(tensor, name, remedy)
    return digest(tensor)


def _entries(specs: Iterable[TensorSpec]) -> dict[str, Any]:
    """Return a header's entries. The slices of a tensor make one entry: their bytes are the tensor's."""
    entries: dict[str, Any] = {}
    offset = 0
    for name, parts in itertools.groupby(specs, lambda spec: whole_name(spec.name)):
        whole = list(parts)
        assert name not in entries, f"the slices of {name} do not follow one another"
        first, shape = whole[0], list(whole[0].shape)
        if first.name != name:
            assert [spec.name for spec in whole] == [slice_name(name, index) for index in range(len(whole))]
            shape = [len(whole), *shape]
        end = offset + sum(spec.num_bytes for spec in whole)
        entries[name] = {"dtype": NAME_OF_DTYPE[first.dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    return entries


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """Write the index of several shards; a single shard has no index."""
    if len(shards) > 1:
        weight_map = {whole_name(spec.name): shard.file for shard in shards for spec in shard.tensors}
        total = sum(shard.num_bytes for shard in shards)
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
