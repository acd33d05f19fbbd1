"""Sums of a checkpoint's files: written after each save, and compared before each load, by all ranks together.

`file_sums.json` beside the files has an xxh3 sum for each block of 1 GiB of each file, so that ranks share a large file
too. A sum finds damage on disk or in a copy. It is no signature: who can change a file can change its sum.
"""

from __future__ import annotations

import heapq
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
import xxhash

from megatron_fdd.host.ahead import ahead
from megatron_fdd.host.disk import replacing, sized
from megatron_fdd.host.json_file import read_json, write_json
from megatron_fdd.host.together import together

SUMS_FILE = "file_sums.json"
_INDEX_FILE = ".metadata"
_ALGORITHM = "xxh3_128"
_BLOCK_BYTES = 1 << 30
# So much is in memory at a time.
_READ_BYTES = 1 << 20
# Beside the `.distcp` files.
_OTHER_FILES = frozenset({_INDEX_FILE, "metadata.json", "common.pt"})
SKIP_FLAG = "--fdd-skip-checksums"


@dataclass(frozen=True, slots=True)
class _Block:
    """A part of a file that one rank reads, and what it must be.

    Attributes:
        folder: the flag and the folder of the file's checkpoint, for a message.
        file_bytes: of the whole file.
        start: the block's first byte in it.
        size: in bytes.
        expected: the sum of its bytes.
    """

    folder: str
    path: Path
    file_bytes: int
    start: int
    size: int
    expected: str


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
                size = path.stat().st_size
                sum_at = partial(sum_of, path, size=_BLOCK_BYTES)
                blocks = [(start, _READ_BYTES) for start in _starts(size, _BLOCK_BYTES)]
                own[path.name] = {"bytes": size, "sums": list(ahead(sum_at, blocks))}
    everyone: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    with together():
        if dist.get_rank() == 0:
            files = {name: entry for each in everyone for name, entry in sorted(each.items())}
            with replacing(folder / SUMS_FILE) as unfinished:
                write_json(unfinished, {"algorithm": _ALGORITHM, "block_bytes": _BLOCK_BYTES, "files": files})


def mark_unfinished(folder: Path) -> None:
    """Make a folder that is about to be written again look as one that was never finished, until the save has ended.

    Its index goes with its sums: after a kill, it would describe a mixture of old and new files.
    """
    for name in (SUMS_FILE, _INDEX_FILE):
        (folder / name).unlink(missing_ok=True)


def check_sums(checkpoints: Mapping[str, Path], *, skip: bool = False) -> str:
    """Refuse checkpoints whose files differ from the sums beside them; each rank reads its share of the bytes.

    A checkpoint without sums passes with a remark: this package did not save it, or was ended before it wrote them.

    Args:
        checkpoints: the folder of an iteration, or a `release` folder, by the flag that named it.
        skip: the value of --fdd-skip-checksums: nothing is read, and that is said.

    Returns:
        For people: what was compared and how long it took, or what could not be.

    Collectives: one all-gather of a few words over all ranks; none with `skip`.

    Raises:
        ValueError: a file is missing, has another size or another sum, or is not listed. The same on every rank.
    """
    if skip:
        named = " and ".join(f"{flag} {folder}" for flag, folder in checkpoints.items())
        return f"{SKIP_FLAG}: the files of {named} were not compared with their sums; damage would not be noticed"
    started_s = time.perf_counter()
    remarks = []
    num_bytes = 0
    with together():
        blocks: list[_Block] = []
        for flag, folder in checkpoints.items():
            if os.path.lexists(folder / SUMS_FILE):
                blocks += _read_sums(folder, flag)
            else:
                remarks.append(
                    f"{flag} {folder}: no file sums lie beside its files (another program saved "
                    "it, or the run ended before they were written); damage inside a tensor would not be noticed"
                )
        num_bytes = sum(block.size for block in blocks)
        share = _deal(blocks, dist.get_world_size())[dist.get_rank()]
        list(ahead(_check_block, [(block, _READ_BYTES) for block in share]))
    if num_bytes:
        seconds = time.perf_counter() - started_s
        remarks.append(
            f"file sums of {sized(num_bytes)} of checkpoints are right (compared in {seconds:.1f} s; {SKIP_FLAG} "
            "leaves that out)"
        )
    return "\n".join(remarks)


def _is_summed(path: Path) -> bool:
    """Whether a file is of the checkpoint: other programs may keep files and folders beside."""
    return path.is_file() and (path.suffix == ".distcp" or path.name in _OTHER_FILES)


def _starts(num_bytes: int, block_bytes: int) -> range:
    """Return the first byte of each block of a file; an empty file has one block."""
    return range(0, max(num_bytes, 1), block_bytes)


def sum_of(path: Path, start: int, size: int) -> str:
    """Return the xxh3 sum of `size` bytes of a file, or of those up to its end."""
    found, buffer = xxhash.xxh3_128(), memoryview(bytearray(_READ_BYTES))  # new memory is dearer than a sum
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while num_bytes := file.readinto(buffer[:size]):
            found.update(buffer[:num_bytes])
            size -= num_bytes
    return found.hexdigest()


def _writer_of(name: str) -> int:
    """Return the rank that wrote a file: torch's writer names it `__RANK_NUMBER.distcp`."""
    rank = name.split("_")[2] if name.startswith("__") and name.count("_") > 2 else ""
    return int(rank) if rank.isdecimal() and int(rank) < dist.get_world_size() else 0


def _read_sums(folder: Path, flag: str) -> list[_Block]:
    """Read the sums beside a checkpoint's files.

    Raises:
        ValueError: they are malformed, or lack a file of the checkpoint.
    """
    path = folder / SUMS_FILE
    content: dict[str, Any] = {}
    with suppress(ValueError):  # malformed, or an empty file after a loss of power
        content = read_json(path)
    files = content.get("files")
    by_name: dict[str, list[_Block]] = {}
    if content.get("algorithm") == _ALGORITHM and isinstance(files, dict):
        size = content.get("block_bytes")
        by_name = {
            name: _blocks_of(folder / name, entry, size, f"{flag} {folder}") for name, entry in files.items()
        }
    if not by_name or not all(Path(name).name == name and blocks for name, blocks in by_name.items()):
        raise ValueError(
            f"{flag} {path}: not the sums that this version writes; delete the file to load without it, or give "
            f"{SKIP_FLAG}"
        )
    for found in sorted(folder.iterdir()):
        if _is_summed(found) and found.name not in by_name:
            raise ValueError(
                f"{flag} {path}: does not list {found.name}; copy the checkpoint again, or delete {SUMS_FILE} if that "
                f"file was added on purpose; {SKIP_FLAG} loads it as it is"
            )
    return [block for blocks in by_name.values() for block in blocks]


def _blocks_of(path: Path, entry: object, block_bytes: object, folder: str) -> list[_Block]:
    """Return the blocks of a file; none if its entry is malformed. Earlier versions wrote one sum for a file."""
    size = entry.get("bytes") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or type(size) is not int or size < 0:
        return []
    sums = [entry["sum"]] if "sum" in entry else entry.get("sums")
    each = max(size, 1) if "sum" in entry else block_bytes
    if not isinstance(sums, list) or not all(isinstance(found, str) for found in sums):
        return []
    if type(each) is not int or each < 1 or len(sums) != math.ceil(max(size, 1) / each):
        return []
    return [
        _Block(folder, path, size, start, min(each, size - start), found)
        for start, found in zip(_starts(size, each), sums, strict=True)
    ]


def _deal(blocks: Sequence[_Block], num_ranks: int) -> list[list[_Block]]:
    """Deal blocks to ranks: the largest first, each to the rank that has the fewest bytes. The same on every rank."""
    shares: list[list[_Block]] = [[] for _ in range(num_ranks)]
    loads = [(0, rank) for rank in range(num_ranks)]
    for block in sorted(blocks, key=lambda block: -block.size):
        load, rank = loads[0]
        heapq.heapreplace(loads, (load + block.size, rank))
        shares[rank].append(block)
    return shares


def _check_block(block: _Block) -> None:
    """Refuse a block of a file that is not the one that was saved."""
    size = block.path.stat().st_size if block.path.is_file() else None
    if size != block.file_bytes:
        found = "is missing" if size is None else f"has {size} bytes and had {block.file_bytes}"
    elif sum_of(block.path, block.start, block.size) != block.expected:
        found = "has other bytes than when it was saved"
    else:
        return
    raise ValueError(
        f"{block.folder}: {block.path.name} {found}: the disk or the copy is damaged. Copy it again, or go on from "
        f"another checkpoint. If it was changed on purpose, delete {SUMS_FILE} beside it; {SKIP_FLAG} loads it as it is"
    )
