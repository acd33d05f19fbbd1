"""Files of a store that are there whole and on disk, or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from megatron_fdd.host.disk import writing

UNFINISHED = ".unfinished"
_STALE_S = 24 * 3600.0
# What os.link says where there are no hard links.
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
# How long another process may have for a rename, and how often it is looked for.
_CLAIM_S, _WAIT_S = 30.0, 0.05
# Tensors that need the most begin first, as the format wants it.
_ALIGNMENT = {"I64": 8, "U64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "U8": 1}


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor of a safetensors file, whose bytes lie in several arrays, one behind the other.

    Attributes:
        dtype: by the format's name, such as "I64".
    """

    dtype: str
    shape: tuple[int, ...]
    parts: Sequence[NDArray[Any]]


@contextmanager
def unfinished(store: Path, path: Path) -> Iterator[Path]:
    """Give a place beside `path` to write to, and remove what is left there at the end.

    Raises:
        ValueError: the disk cannot take it; the message names the store.
    """
    # A random part, because processes of several containers may have the same host name and number.
    name = f".{path.name}.{os.uname().nodename}.{os.getpid()}.{secrets.token_hex(4)}{UNFINISHED}"
    with writing("--store", store):
        path.parent.mkdir(parents=True, exist_ok=True)
        place = path.with_name(name)
        try:
            with writing("--store", store):  # tells the room before there is more again
                yield place
        finally:
            place.unlink(missing_ok=True)


def write_tensors(
    store: Path, path: Path, tensors: Mapping[str, FileTensor], about: Mapping[str, str]
) -> None:
    """Write a safetensors file of a store; one that is there is replaced.

    The library's own writer is not used: it copies every tensor twice, and its errors do not say their number.

    Raises:
        ValueError: the disk cannot take the file, or a folder is in its place; then there is none, or the one before.
    """
    if path.is_dir():
        raise ValueError(
            f"{path}: is a folder, where a file of the store belongs; remove it, and start again"
        )
    order = sorted(tensors, key=lambda name: (-_ALIGNMENT[tensors[name].dtype], name))
    header: dict[str, Any] = {"__metadata__": dict(about)}
    at = 0
    for name in order:
        tensor = tensors[name]
        size = sum(part.nbytes for part in tensor.parts)
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (at, at + size)}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with unfinished(store, path) as place:
        with place.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                for part in tensors[name].parts:
                    file.write(part.reshape(-1).data)
            file.flush()
            os.fsync(file.fileno())
        place.replace(path)
        sync_folder(path.parent)


def give_name(place: Path, path: Path) -> None:
    """Give a whole file its name, unless a file of that name is there: unlike a rename, this never replaces one.

    Where the file system has no hard links (FAT, some of FUSE), the one process that can make a folder of a certain
    name renames the file; the others wait for it.

    Raises:
        ValueError: a process was killed between both; names the folder.
        OSError: the system refuses.
    """
    try:
        os.link(place, path)
    except FileExistsError:
        return
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    else:
        return
    claim = path.with_name(f".{path.name}.claim")
    until_s = time.monotonic() + _CLAIM_S
    while not path.exists():
        try:
            claim.mkdir()
        except FileExistsError:
            if time.monotonic() > until_s:
                raise ValueError(
                    f"{path}: another producer was ended while it made this file: remove the folder {claim}, and "
                    "start again"
                ) from None
            time.sleep(_WAIT_S)
            continue
        try:
            if not path.exists():
                place.replace(path)
        finally:
            claim.rmdir()


def sync_folder(path: Path) -> None:
    """Wait until a folder's entries are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(store: Path) -> int:
    """Remove what writers left that were killed more than a day ago; return how many files that were."""
    return sum(remove_old(store.glob(f"{depth}.*{UNFINISHED}")) for depth in ("", "*/", "*/*/"))


def remove_old(paths: Iterable[Path]) -> int:
    """Remove those of some files that have not changed for a day; return how many that were."""
    count = 0
    for path in paths:
        with contextlib.suppress(OSError):  # what cannot be removed harms nobody
            if time.time() - path.stat().st_mtime > _STALE_S:
                path.unlink()
                count += 1
    return count
