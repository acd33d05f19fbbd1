"""Checksums of a checkpoint's files: every kind of damage is found, on every rank, whichever rank's share it is in."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch.distributed as dist
import xxhash

from megatron_fdd.host import file_sums
from megatron_fdd.host.file_sums import SUMS_FILE, check_sums, mark_unfinished, write_sums
from tests.harness.ranks import distributed

NAMES = ("__0_0.distcp", "__0_1.distcp", "__1_0.distcp", "__7_0.distcp", ".metadata", "metadata.json")


def flip_bit(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def change_sums(path: Path, change: Callable[[dict], object]) -> None:
    """Write other sums."""
    sums = path.parent / SUMS_FILE
    content = json.loads(sums.read_text())
    change(content)
    sums.write_text(json.dumps(content))


# What happens to the file, and what is said.
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (flip_bit, "has other bytes than when it was saved: the disk or the copy is damaged"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes and had"),
    "gone": (lambda path: path.unlink(), "is missing"),
    "not listed": (
        lambda path: change_sums(path, lambda content: content["files"].pop(path.name)),
        "does not list",
    ),
    "another program's": (
        lambda path: change_sums(path, lambda content: content.update(algorithm="crc")),
        "not the sums that this version writes",
    ),
    "not JSON": (
        lambda path: (path.parent / SUMS_FILE).write_bytes(b"\xff{"),
        "not the sums that this version writes; delete the file",
    ),
    "empty": (
        lambda path: (path.parent / SUMS_FILE).write_bytes(b""),
        "not the sums that this version writes",
    ),
    "no sum": (
        lambda path: change_sums(path, lambda content: content["files"][path.name].update(sums=[3])),
        "not the sums that this version writes",
    ),
    "too few sums": (
        lambda path: change_sums(path, lambda content: content["files"][path.name]["sums"].pop()),
        "not the sums that this version writes",
    ),
    "blocks of no size": (
        lambda path: change_sums(path, lambda content: content.update(block_bytes=0)),
        "not the sums that this version writes",
    ),
}


def result(folder: Path) -> str:
    """The remark, or the error, which must be the same on every rank."""
    try:
        told = check_sums({"--load": folder})
    except ValueError as error:
        told = f"refused: {error}"
    everyone = [""] * dist.get_world_size()
    dist.all_gather_object(everyone, told.split("compared in")[0])
    assert len(set(everyone)) == 1, everyone
    return told


def as_earlier_versions(path: Path) -> None:
    """Write the sums as earlier versions did: one for a file."""

    def change(content: dict) -> None:
        del content["block_bytes"]
        for name, entry in content["files"].items():
            del entry["sums"]
            entry["sum"] = xxhash.xxh3_128((path.parent / name).read_bytes()).hexdigest()

    change_sums(path, change)


@distributed(ranks=2)
def test_damage_is_found_wherever_it_is(tmp_path: Path) -> None:
    """In files of 100 to 600 bytes, that is of one to four blocks."""
    is_first = dist.get_rank() == 0
    for number, name in enumerate(NAMES):
        if is_first:
            (tmp_path / name).write_bytes(bytes(range(100)) * (number + 1))
    dist.barrier()
    assert "no file sums lie beside its files" in result(tmp_path)
    if is_first:
        (tmp_path / SUMS_FILE).symlink_to("gone")
    dist.barrier()
    assert "not the sums that this version writes" in result(tmp_path)
    dist.barrier()
    if is_first:
        (tmp_path / SUMS_FILE).unlink()
    dist.barrier()
    with patch.object(file_sums, "_BLOCK_BYTES", 150):
        write_sums(tmp_path)
    dist.barrier()
    assert sorted(json.loads((tmp_path / SUMS_FILE).read_text())["files"]) == sorted(NAMES)
    assert re.search(r"file sums of [\d.]+ [kM]?B of checkpoints are right", result(tmp_path))
    saved = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for kind, (damage, said) in DAMAGE.items():
        for name in NAMES[:3] if kind == "not listed" else NAMES:
            if is_first:
                damage(tmp_path / name)
            dist.barrier()
            told = result(tmp_path)
            assert told.startswith(f"refused: --load {tmp_path}"), told
            assert said in told, (kind, name, told)
            assert "--fdd-skip-checksums" in told, "the way out for somebody who knows"
            dist.barrier()
            if is_first:
                for path, content in saved.items():
                    path.write_bytes(content)
            dist.barrier()
    assert "are right" in result(tmp_path)
    dist.barrier()
    if is_first:
        as_earlier_versions(tmp_path / NAMES[0])
    dist.barrier()
    assert "are right" in result(tmp_path)
    dist.barrier()
    if is_first:
        flip_bit(tmp_path / NAMES[3])
    dist.barrier()
    assert "has other bytes than when it was saved" in result(tmp_path)


def test_sums_that_are_skipped_are_said(tmp_path: Path) -> None:
    """Nothing is read, and no process group is needed."""
    said = check_sums({"--load": tmp_path / "a", "--teacher-load": tmp_path / "b"}, skip=True)
    assert said.startswith(
        f"--fdd-skip-checksums: the files of --load {tmp_path}/a and --teacher-load {tmp_path}/b were not compared"
    )


@pytest.mark.parametrize("num_ranks", [1, 3, 8, 64])
def test_a_large_file_is_shared(num_ranks: int, tmp_path: Path) -> None:
    """No rank reads more than a block too many, where one file has 40 blocks and small files lie beside it."""
    sizes = {"__0_0.distcp": 40 * 1024 + 7, ".metadata": 30, "__1_0.distcp": 0, "__2_0.distcp": 700}
    entries = {
        name: {"bytes": size, "sums": ["x"] * max(1, -(-size // 1024))} for name, size in sizes.items()
    }
    content = {"algorithm": "xxh3_128", "block_bytes": 1024, "files": entries}
    (tmp_path / SUMS_FILE).write_text(json.dumps(content))
    blocks = file_sums._read_sums(tmp_path, "--load")
    shares = file_sums._deal(blocks, num_ranks)
    assert sorted(map(str, blocks)) == sorted(str(block) for share in shares for block in share)
    assert {name: sum(each.size for each in blocks if each.path.name == name) for name in sizes} == sizes
    bytes_of = [sum(block.size for block in share) for share in shares]
    assert max(bytes_of) <= sum(sizes.values()) / num_ranks + 1024
    assert file_sums._deal(blocks, num_ranks) == shares


def test_a_block_is_a_part_of_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_sums, "_READ_BYTES", 7)
    (tmp_path / "file").write_bytes(bytes(range(100)))
    for start, size in ((0, 100), (0, 30), (30, 30), (90, 30), (100, 5)):
        found = file_sums.sum_of(tmp_path / "file", start, size)
        assert found == xxhash.xxh3_128(bytes(range(100))[start : start + size]).hexdigest()


def test_a_folder_that_is_written_again_is_not_whole_until_the_end(tmp_path: Path) -> None:
    """A kill would leave old and new files together, and an index that fits both."""
    for name in ("__0_0.distcp", ".metadata", SUMS_FILE):
        (tmp_path / name).touch()
    mark_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["__0_0.distcp"]
    mark_unfinished(tmp_path / "new")


@distributed(ranks=1)
def test_a_file_of_older_versions_is_not_slipped_in(tmp_path: Path) -> None:
    """Megatron reads common.pt before all others, where it exists."""
    (tmp_path / ".metadata").write_bytes(b"index")
    write_sums(tmp_path)
    assert "are right" in result(tmp_path)
    (tmp_path / "common.pt").write_bytes(b"arguments")
    assert "does not list common.pt" in result(tmp_path)
