"""Checksums of a checkpoint's files: every kind of damage is found, on every rank, whichever rank's share it is in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from megatron_fdd.host.file_sums import SUMS_FILE, check_sums, write_sums
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
    "no sum": (
        lambda path: change_sums(path, lambda content: content["files"][path.name].update(sum=3)),
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


@distributed(ranks=2)
def test_damage_is_found_wherever_it_is(tmp_path: Path) -> None:
    is_first = dist.get_rank() == 0
    for number, name in enumerate(NAMES):
        if is_first:
            (tmp_path / name).write_bytes(bytes(range(100)) * (number + 1))
    dist.barrier()
    assert "no checksums lie beside its files" in result(tmp_path)
    write_sums(tmp_path)
    dist.barrier()
    assert sorted(json.loads((tmp_path / SUMS_FILE).read_text())["files"]) == sorted(NAMES)
    assert "checksums of 0.00 GB of checkpoints are right" in result(tmp_path)
    saved = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for kind, (damage, said) in DAMAGE.items():
        for name in NAMES[:3] if kind == "not listed" else NAMES:
            if is_first:
                damage(tmp_path / name)
            dist.barrier()
            told = result(tmp_path)
            assert told.startswith(
                f"refused: {'--load ' if kind in ('flipped', 'cut', 'gone') else ''}{tmp_path}"
            ), told
            assert said in told, (kind, name, told)
            dist.barrier()
            if is_first:
                for path, content in saved.items():
                    path.write_bytes(content)
            dist.barrier()
    assert "are right" in result(tmp_path)
