"""Megatron's index cache: a file in it that is not whole, or has changed, is removed before Megatron takes it for good.

Megatron writes the index of a text set, or of a blend, in place, and any file of the right name counts. So a run that
is killed in that moment, or whose disk is full, would stop every later run.
"""

from __future__ import annotations

import argparse
import os
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_fdd.data.index_sums import differs, keep_sums, may_be_read_by, sum_place
from megatron_fdd.data.sources import cache_folder, data_prefixes
from megatron_fdd.host.disk import explain

# A file that another run is writing grows in this time.
_GROWTH_S = 5.0
_KILLED = ": a run was killed, or its disk was full, while it wrote this file"


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a file of the cache holds.

    Attributes:
        columns: None for an array of one dimension.
        companion: another file, by the end of its name, whose first dimension is the same but for `more` rows.
    """

    dtypes: tuple[str, ...]
    columns: int | None = None
    companion: str | None = None
    more: int = 0


# The data sets whose files these are, by the class in the name; files of others may lie in the same folder.
_CLASSES = ("TextDataset", "MockTextDataset", "GPTDataset", "MockGPTDataset", "BlendedDataset")
# By the end of the name, as Megatron 0.19.2 writes them.
_KINDS = {
    "document_index.npy": _Kind(("int32",)),
    "sample_index.npy": _Kind(("int32", "int64"), columns=2),
    "shuffle_index.npy": _Kind(("uint32", "int64"), companion="sample_index.npy", more=1),
    "dataset_index.npy": _Kind(("int16",)),
    "dataset_sample_index.npy": _Kind(("int64",), companion="dataset_index.npy"),
}


def check_cache_folders(args: argparse.Namespace) -> None:
    """Refuse a folder for the index cache that cannot be written.

    Rank 0 writes the cache; if it failed there, the other ranks would wait at a barrier.

    Raises:
        ValueError: names the folder.
    """
    if args.dataloader_fast_cache_load:
        return
    for folder in _folders(args):
        existing = os.path.abspath(folder)
        while not os.path.exists(existing):
            existing = os.path.dirname(existing)
        if not os.path.isdir(existing) or not os.access(existing, os.W_OK | os.X_OK):
            raise ValueError(
                f"cannot create the index cache {folder}: {existing} is not a writable folder; give a "
                "writable one with --data-cache-path"
            )


def mend_cache(args: argparse.Namespace) -> None:
    """Remove files of the index cache that are not as they were built, on rank 0, which builds them again, and warn.

    A file that still grows is another run's: wait until it is whole.

    Raises:
        ValueError: there is one, and with --dataloader-fast-cache-load nobody would build it again.
    """
    if args.rank != 0:
        return
    faults = _faults(args)
    while faults:
        sizes = {path: _size(path) for path in faults}
        time.sleep(_GROWTH_S)
        later = _faults(args)
        settled = [path for path in later if path in sizes and sizes[path] == _size(path)]
        for path in settled:
            _remove(path, later[path], is_needed=args.dataloader_fast_cache_load)
        faults = {path: fault for path, fault in later.items() if path not in settled}


def keep_cache_sums(args: argparse.Namespace) -> None:
    """Write sums beside the files of the index cache that this run has built or read, on rank 0."""
    if args.rank == 0:
        paths = [path for path in _paths(args) if _kind(path) is not None and may_be_read_by(args, path)]
        keep_sums(path for path in paths if _fault(path) is None)


@contextmanager
def told_cache(args: argparse.Namespace) -> Iterator[None]:
    """Explain, in a block that builds data sets, why the index cache could not be written or read.

    Raises:
        ValueError: names the folders and the system's message.
    """
    try:
        yield
    except Exception as error:  # Megatron raises its own from the system's
        cause = error.__cause__
        if not isinstance(cause, OSError):
            if not _is_of_reading(error):
                raise
            raise ValueError(
                f"the index cache in {', '.join(map(str, _folders(args)))} cannot be read: {error}. Delete that "
                "folder: it is built again"
            ) from error
        raise ValueError(
            f"the index cache in {', '.join(map(str, _folders(args)))} cannot be written: {explain(cause)} with "
            "--data-cache-path. What is not whole is built again at the next start"
        ) from error


def _is_of_reading(error: Exception) -> bool:
    """Whether Megatron could not read a file of the cache."""
    return any(entry.name == "safe_numpy_load" for entry in traceback.extract_tb(error.__traceback__))


def _folders(args: argparse.Namespace) -> list[Path]:
    """Return the folders in which Megatron keeps the indices of this run's data."""
    if args.data_cache_path:
        return [Path(args.data_cache_path)]
    return [Path(cache_folder(args, prefix)) for prefix in data_prefixes(args)]


def _faults(args: argparse.Namespace) -> dict[Path, str]:
    """Return the files of the cache that are not as they were built, each with what is wrong."""
    faults = {}
    for path in filter(_kind, _paths(args)):
        fault = _fault(path)
        if fault is None and may_be_read_by(args, path) and differs(path):
            fault = "has other bytes than when it was built: the disk is damaged, or somebody has changed it"
        if fault is not None:
            faults[path] = fault
    return faults


def _paths(args: argparse.Namespace) -> list[Path]:
    return [path for folder in _folders(args) for path in sorted(folder.glob("*.npy"))]


def _kind(path: Path) -> _Kind | None:
    """Return what a file of the cache holds; None if it is not Megatron's."""
    kind = _KINDS.get(path.name.rpartition("-")[2])
    return kind if any(f"-{each}-" in path.name for each in _CLASSES) else None


def _fault(path: Path) -> str | None:
    """Return why a file of the cache is not whole; None if it is."""
    kind = _kind(path)
    assert kind is not None, "only Megatron's files are asked about"
    if not path.is_file():
        return "is no regular file"
    try:
        array = _opened(path)
    except OSError:  # another user's: if Megatron needs it, it says so
        return None
    if array is None:
        return f"is cut off, or holds no array{_KILLED}"
    columns = () if kind.columns is None else (kind.columns,)
    if array.ndim == 0 or array.shape[1:] != columns or str(array.dtype) not in kind.dtypes:
        return f"holds {array.dtype} of shape {list(array.shape)}{_KILLED}"
    other_path = path.with_name(f"{path.name.rpartition('-')[0]}-{kind.companion}")
    other = _opened(other_path) if kind.companion is not None and other_path.is_file() else None
    if other is not None and other.ndim and len(other) != len(array) + kind.more:
        return f"has {len(array)} entries, {kind.companion} beside it {len(other)}{_KILLED}"
    return None


def _opened(path: Path) -> np.memmap | None:
    """Map an array; None if there is no regular file, or one whose length is not what its header says.

    Raises:
        OSError: the file cannot be read.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for
        return None
    try:
        array = np.lib.format.open_memmap(path, mode="r")
        return array if path.stat().st_size == array.offset + array.nbytes else None
    except FileNotFoundError:
        return None
    except OSError:
        raise
    except Exception:  # whatever the bytes are
        return None


def _size(path: Path) -> int | None:
    """Return the length of a file; None if another run has removed it meanwhile."""
    try:
        return path.stat().st_size
    except OSError:
        return None


def _remove(path: Path, fault: str, *, is_needed: bool) -> None:
    """Remove a file with a fault, and its sum. What is no file was never Megatron's, and stays."""
    if not os.path.lexists(path):
        return  # another run was quicker
    if not path.is_file():
        raise ValueError(f"the index cache {path} {fault}; remove it, or give another --data-cache-path")
    told = f"the index cache {path} {fault}"
    if is_needed:
        raise ValueError(f"{told}. Start once without --dataloader-fast-cache-load, which builds it again")
    try:
        sum_place(path).unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(
            f"{told}. It cannot be removed: {explain(error)}; give another --data-cache-path"
        ) from error
    warnings.warn(f"{told}; removed, it is built again", stacklevel=3)
