"""The index of a checkpoint folder: every entry, where its bytes are, and whether they are there and harmless."""

from __future__ import annotations

import hashlib
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError

import torch
from megatron.core.dist_checkpointing.core import CONFIG_FNAME
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from megatron_fdd.host.damage import DAMAGE, cause_of
from megatron_fdd.host.field_kinds import shown
from megatron_fdd.host.json_file import read_json
from megatron_fdd.host.unpickling import (
    ForbiddenClassError,
    check_object,
    is_trusting,
    load_index,
    why_forbidden,
)

_ALL = slice(None)
# No tensor has more: the products of sizes beyond it overflow in torch.
_MOST_NUMBERS = 1 << 50
# How the names of the objects begin in which Megatron stores its common state.
_COMMON_STATE = "common_state/"
_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}

# Beside the index and the files that it names.
_OPENED_BY_NAME = ("metadata.json", COMMON_STATE_FNAME)


def read_checkpoint_index(path: Path, flag: str) -> Metadata:
    """Return the index of torch's checkpoints: every entry, and where its bytes are."""
    index_path = path / ".metadata"
    if not index_path.is_file():
        raise ValueError(
            f"{flag} {path}: .metadata is missing; the save or the copy was interrupted. Copy it again, or go on from "
            "another iteration (--ckpt-step N)"
        )
    status = index_path.stat()
    try:
        return _loaded(index_path, status.st_mtime_ns, status.st_size)
    except ForbiddenClassError as error:
        raise _forbidden(path, flag, ".metadata", error) from error
    except Exception as error:
        raise ValueError(
            f"{flag} {path}: .metadata cannot be read ({error}); the copy is damaged; copy it again"
        ) from error


@lru_cache(maxsize=4)
def _loaded(index_path: Path, _mtime_ns: int, _num_bytes: int) -> Metadata:
    """Load and check an index, once for all that a run asks of it: with experts it has 100,000 entries."""
    with index_path.open("rb") as file:
        index = load_index(file)
    _check_index(index)
    return index


def _check_index(index: object) -> None:
    """Refuse an index whose parts have other types than torch gives them, or that points out of the folder."""
    if not isinstance(index, Metadata) or not isinstance(index.storage_data, dict):
        raise UnpicklingError("it is no index of a checkpoint")
    for item, place in index.storage_data.items():
        numbers = (place.offset, place.length)
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise UnpicklingError(f"{item.fqn} lies at {numbers[0]!r} and has {numbers[1]!r} bytes")
        if Path(place.relative_path).name != place.relative_path:
            raise UnpicklingError(
                f"{item.fqn} lies in {place.relative_path!r}, which is no file of this folder"
            )
    for name, entry in index.state_dict_metadata.items():
        if not isinstance(entry, BytesStorageMetadata):
            _check_tensor(name, entry)


def _check_tensor(name: str, entry: TensorStorageMetadata) -> None:
    """Refuse a tensor's entry whose parts have other types, is of no real size, or has a chunk beyond its shape."""
    shape, dtype, chunks = entry.size, entry.properties.dtype, entry.chunks
    if (
        not (isinstance(shape, torch.Size) and isinstance(dtype, torch.dtype))
        or math.prod(shape) > _MOST_NUMBERS
    ):
        raise UnpicklingError(f"{name} has the shape {shape!r} and the dtype {dtype!r}")
    for chunk in chunks if isinstance(chunks, list) else [chunks]:
        offsets, sizes = (getattr(chunk, name, ()) for name in ("offsets", "sizes"))
        are_sizes = isinstance(offsets, torch.Size) and isinstance(sizes, torch.Size)
        if (
            not are_sizes
            or not len(shape) == len(offsets) == len(sizes)
            or any(
                first < 0 or count < 0 or first + count > size
                for first, count, size in zip(offsets, sizes, shape, strict=True)
            )
        ):
            raise UnpicklingError(f"{name} of the shape {list(shape)} has a chunk {chunk!r}"[:300])


def check_objects(
    path: Path, flag: str, index: Metadata, *, only_common: bool = False, share: slice = _ALL
) -> None:
    """Refuse a checkpoint with an object that could run code when it is loaded; nothing where checkpoints are trusted.

    Every object is read and unpickled by the restricted unpickler, which takes about a millisecond: the arguments,
    each rank's random state, and a few KB for each module of TransformerEngine. Equal ones are checked once.

    Args:
        only_common: whether to check the common state alone, which every rank reads: arguments, schedules.
        share: which of the files that hold objects to read, in the order of their names.
    """
    if is_trusting():
        return
    legacy = path / COMMON_STATE_FNAME  # of older versions of Megatron, which is read first
    if legacy.is_file():
        _check_object(path, flag, legacy.name, legacy.read_bytes())
    are_wanted = {
        name
        for name, entry in index.state_dict_metadata.items()
        if isinstance(entry, BytesStorageMetadata) and (not only_common or name.startswith(_COMMON_STATE))
    }
    checked = set()
    for name, file_name, content in contents(path, index, lambda name: name in are_wanted, share=share):
        digest = hashlib.sha256(content).digest()
        if digest not in checked:
            _check_object(path, flag, f"{file_name}: {name}", content)
            checked.add(digest)


def _check_object(path: Path, flag: str, where: str, content: bytes) -> None:
    """Refuse the bytes of one object, with the place in the message."""
    try:
        check_object(content)
    except ForbiddenClassError as error:
        raise _forbidden(path, flag, where, error) from error
    except DAMAGE as error:
        raise ValueError(
            f"{flag} {path}: {where} cannot be read ({cause_of(error)}); the copy is damaged; copy it again"
        ) from error


def contents(
    path: Path, index: Metadata, is_wanted: Callable[[str], bool], *, share: slice = _ALL
) -> Iterator[tuple[str, str, bytes]]:
    """Yield name, file and bytes of entries. The files are read one after the other, and each is opened once.

    Args:
        share: which of the files with such entries to read, in the order of their names.
    """
    places: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for item, place in index.storage_data.items():
        if is_wanted(item.fqn):
            places[place.relative_path].append((place.offset, place.length, item.fqn))
    for file_name, spans in sorted(places.items())[share]:
        with (path / file_name).open("rb") as file:
            for offset, length, name in sorted(spans):
                file.seek(offset)
                yield name, file_name, file.read(length)


def _forbidden(path: Path, flag: str, where: str, error: ForbiddenClassError) -> ValueError:
    return ValueError(f"{flag} {path}: {where} {why_forbidden(str(error))}")


def check_format(path: Path, flag: str) -> None:
    """Refuse a checkpoint unless what Megatron opens by name can be read: its format, and what old versions stored.

    Raises:
        ValueError: one of these is no regular file, or the format is another one.
    """
    for name in (CONFIG_FNAME, COMMON_STATE_FNAME):
        if os.path.lexists(path / name) and not (path / name).is_file():
            raise ValueError(f"{flag} {path}: {name} is no regular file; the copy is damaged; copy it again")
    if not (path / CONFIG_FNAME).is_file():
        raise ValueError(
            f"{flag} {path}: {CONFIG_FNAME} is missing; the save or the copy was interrupted; copy it again"
        )
    try:
        found = read_json(path / CONFIG_FNAME)
    except ValueError as error:
        raise ValueError(f"{flag} {error}") from error
    for name, needed in _FORMAT.items():
        if found.get(name) != needed:
            raise ValueError(
                f"{flag} {path}: {CONFIG_FNAME} has {name} {shown(found.get(name))} and must have {shown(needed)}: "
                "another format is not read, or the copy is damaged; copy it again"
            )


def check_files(path: Path, flag: str, index: Metadata) -> None:
    """Refuse a checkpoint unless every byte to which its index points is on disk.

    Everything that Megatron opens in it must be a regular file: it would wait for the writer of a pipe.
    """
    needed = {name: 0 for name in _OPENED_BY_NAME if (path / name).exists()}
    for item in index.storage_data.values():
        needed[item.relative_path] = max(needed.get(item.relative_path, 0), item.offset + item.length)
    for name, length in sorted(needed.items()):
        file_path = path / name
        if not file_path.is_file():
            what = "is no regular file" if file_path.exists() else "is missing"
            raise ValueError(f"{flag} {path}: {name} {what}; copy or save the checkpoint again")
        size = file_path.stat().st_size
        if size < length:
            raise ValueError(
                f"{flag} {path}: {name} has {size} bytes and needs {length}; "
                "the checkpoint is truncated, copy or save it again"
            )
