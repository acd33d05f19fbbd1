"""Checksums of a checkpoint's files: written after each save, and compared before each load, by all ranks together.

A sum finds damage on disk or in a copy. It is no signature: who can change a file can change its sum.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
import xxhash

from megatron_fdd.host.json_file import read_json, write_json
from megatron_fdd.host.together import together

SUMS_FILE = "file_sums.json"
_ALGORITHM = "xxh3_128"
# Beside the `.distcp` files.
_OTHER_FILES = frozenset({".metadata", "metadata.json", "common.pt"})
SKIP_FLAG = "--fdd-skip-checksums"


def write_sums(folder: Path) -> None:
    """Write the sums of a checkpoint's files into its folder. Every file is read once, from the system's cache mostly.

    A rank sums the files that it has written (`__RANK_0.distcp` ...), and the first rank the others.

    Collectives: three all-gathers over all ranks, one of a few words per file.

    Raises:
        OSError, ValueError: a file cannot be read or written. The same on every rank.
    """
    own = {}
    with together():
        for path in sorted(folder.iterdir()):
            if _is_summed(path) and _writer_of(path.name) == dist.get_rank():
                own[path.name] = {"bytes": path.stat().st_size, "sum": _sum_of(path)}
    everyone: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    with together():
        if dist.get_rank() == 0:
            files = {name: entry for each in everyone for name, entry in sorted(each.items())}
            unfinished = folder / f"{SUMS_FILE}.partial"
            write_json(unfinished, {"algorithm": _ALGORITHM, "files": files})
            unfinished.replace(folder / SUMS_FILE)


def forget_sums(folder: Path) -> None:
    """Remove the sums of a folder that is about to be written again: a kill in between must not leave wrong ones."""
    (folder / SUMS_FILE).unlink(missing_ok=True)


def check_sums(checkpoints: Mapping[str, Path]) -> str:
    """Compare the files of checkpoints with the sums beside them, each rank its share of the files.

    A checkpoint without sums passes with a remark: this package did not save it, or was ended before it wrote them.

    Args:
        checkpoints: the folder of an iteration, or a `release` folder, by the flag that named it.

    Returns:
        For people: what was compared and how long it took, or what could not be.

    Collectives: one all-gather of a few words over all ranks.

    Raises:
        ValueError: a file is missing, has another size or another sum, or is not listed. The same on every rank.
    """
    started_s = time.perf_counter()
    remarks = []
    num_bytes = 0
    with together():
        for flag, folder in checkpoints.items():
            files = _read_sums(folder)
            if files is None:
                remarks.append(
                    f"{flag} {folder}: no checksums lie beside its files (another program saved "
                    "it, or the run ended before they were written); damage inside a tensor would not be noticed"
                )
                continue
            num_bytes += sum(entry["bytes"] for entry in files.values())
            for name in _share(files):
                _check_file(folder / name, files[name], f"{flag} {folder}")
    if num_bytes:
        seconds = time.perf_counter() - started_s
        remarks.append(
            f"checksums of {num_bytes / 1e9:.2f} GB of checkpoints are right (compared in {seconds:.1f} s; {SKIP_FLAG} "
            "leaves that out)"
        )
    return "\n".join(remarks)


def _is_summed(path: Path) -> bool:
    """Whether a file is of the checkpoint: other programs may keep files and folders beside."""
    return path.is_file() and (path.suffix == ".distcp" or path.name in _OTHER_FILES)


def _sum_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def _writer_of(name: str) -> int:
    """Return the rank that wrote a file: torch's writer names it `__RANK_NUMBER.distcp`."""
    rank = name.split("_")[2] if name.startswith("__") and name.count("_") > 2 else ""
    return int(rank) if rank.isdecimal() and int(rank) < dist.get_world_size() else 0


def _read_sums(folder: Path) -> Mapping[str, Any] | None:
    """Read the sums beside a checkpoint's files; None if there are none.

    Raises:
        ValueError: they are malformed, or lack a file of weights.
    """
    path = folder / SUMS_FILE
    if not path.is_file():
        return None
    content = read_json(path)
    files = content.get("files")
    if (
        content.get("algorithm") != _ALGORITHM
        or not isinstance(files, dict)
        or not all(map(_is_entry, files.items()))
    ):
        raise ValueError(f"{path}: not the sums that this version writes; delete the file to load without it")
    for found in sorted(folder.glob("*.distcp")):
        if found.name not in files:
            raise ValueError(
                f"{path}: does not list {found.name}; if that file was added on purpose, delete {SUMS_FILE}"
            )
    return files


def _is_entry(item: tuple[str, Any]) -> bool:
    name, entry = item
    is_dict = Path(name).name == name and isinstance(entry, dict)
    return is_dict and type(entry.get("bytes")) is int and isinstance(entry.get("sum"), str)


def _share(files: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of this rank's files: the largest are dealt out first."""
    by_size = sorted(files, key=lambda name: (-files[name]["bytes"], name))
    yield from by_size[dist.get_rank() :: dist.get_world_size()]


def _check_file(path: Path, expected: Mapping[str, Any], what: str) -> None:
    """Refuse a file that is not the one that was saved."""
    size = path.stat().st_size if path.is_file() else None
    if size != expected["bytes"]:
        found = "is missing" if size is None else f"has {size} bytes and had {expected['bytes']}"
    elif _sum_of(path) != expected["sum"]:
        found = "has other bytes than when it was saved"
    else:
        return
    raise ValueError(
        f"{what}: {path.name} {found}: the disk or the copy is damaged. Copy it again, or go on from another "
        f"checkpoint; if it was changed on purpose, delete {SUMS_FILE} beside it"
    )
