"""Damaged or wrong checkpoints and tokenizers, made from the toys."""

from __future__ import annotations

import dataclasses
import pickle
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megatron_fdd import convert
from megatron_fdd.host.file_sums import SUMS_FILE
from tests.convert import toys
from tests.harness.ranks import Layout, run_on_ranks
from tests.hostile.checkpoints import Payload


def copied(source: Path, target: Path) -> Path:
    """Copy a checkpoint folder, to damage it; without file sums, as another program would have saved it."""
    return Path(shutil.copytree(source, target, ignore=shutil.ignore_patterns(SUMS_FILE)))


def flipped(source: Path, target: Path) -> Path:
    """Copy a checkpoint folder whole, and change one bit of its largest file."""
    shutil.copytree(source, target)
    largest = max(target.rglob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 4
    largest.write_bytes(content)
    return target


def with_payload(source: Path, target: Path, sign: Path) -> Path:
    """Make a copy that runs code when its index is unpickled without limits: it makes the folder `sign`."""
    path = copied(source, target) / "release" / ".metadata"
    index = pickle.loads(path.read_bytes())
    index.planner_data = Payload(sign)
    path.write_bytes(pickle.dumps(index))
    return target


def with_object(source: Path, target: Path, sign: Path) -> Path:
    """Make a copy with a file of its own for an object that runs code when it is unpickled without limits."""
    release = copied(source, target) / "release"
    index = pickle.loads((release / ".metadata").read_bytes())
    torch.save({"state": Payload(sign)}, release / "__9_0.distcp")
    item, place = next(iter(index.storage_data.items()))
    added = dataclasses.replace(item, fqn="rng_state/shard_0.0_1.1", offset=None, index=None)
    size = (release / "__9_0.distcp").stat().st_size
    index.storage_data[added] = dataclasses.replace(
        place, relative_path="__9_0.distcp", offset=0, length=size
    )
    index.state_dict_metadata[added.fqn] = BytesStorageMetadata()
    (release / ".metadata").write_bytes(pickle.dumps(index))
    return target


def with_args(source: Path, target: Path, **changes: Any) -> Path:
    """Make a copy whose stored arguments contradict its weights."""
    state = _common_state(copied(source, target))
    vars(state["args"]).update(changes)
    return _with_common_state(target, state)


def cut(source: Path, target: Path) -> Path:
    """Make a copy without the end of its largest file."""
    copied(source, target)
    largest = max(target.rglob("*.distcp"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-100])
    return target


def with_tracker(source: Path, target: Path, content: str) -> Path:
    """Make a copy whose tracker file says `content`."""
    (copied(source, target) / "latest_checkpointed_iteration.txt").write_text(content)
    return target


def scratched(source: Path, target: Path, key: str) -> Path:
    """Make a copy in which the entries whose key starts with `key` have only zero bytes."""
    release = copied(source, target) / "release"
    index = pickle.loads((release / ".metadata").read_bytes())
    for entry, item in index.storage_data.items():
        if entry.fqn.startswith(key):
            with (release / item.relative_path).open("r+b") as file:
                file.seek(item.offset)
                file.write(bytes(item.length))
    return target


def without_index(source: Path, target: Path) -> Path:
    """Make a copy without `.metadata`."""
    (copied(source, target) / "release" / ".metadata").unlink()
    return target


def with_tensor(source_hf: Path, target: Path, name: str, value: float) -> Path:
    """Convert a model in which one tensor is filled with `value`."""
    run_on_ranks(
        _convert_filled, Layout(ranks=1), {"hf": source_hf, "to": target, "name": name, "value": value}
    )
    return target


def _convert_filled(hf: Path, to: Path, name: str, value: float) -> None:
    from safetensors.torch import load_file, save_file

    folder = copied(hf, to.with_name(to.name + "-hf"))
    tensors = load_file(folder / "model.safetensors")
    tensors[name].fill_(value)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with patch(
        "megatron_fdd.convert.checksums.is_finite", return_value=True
    ):  # as an older version converted
        convert.hf_to_mcore(folder, to)


def other_tokenizer(folder: Path, *, added: int = 1) -> Path:
    """Make a tokenizer with `added` tokens beyond the toys' base vocabulary, including the toys' own added tokens."""
    toys.make_tokenizer(folder, added=("<|chat|>", *(f"<|{index}|>" for index in range(1, added))))
    return folder


def without_args(source: Path, target: Path) -> Path:
    """Make a copy that stores no arguments."""
    state = _common_state(copied(source, target))
    del state["args"]
    return _with_common_state(target, state)


def _common_state(folder: Path) -> dict[str, Any]:
    return dist_checkpointing.load_common_state_dict(str(folder / "release"))


def _with_common_state(folder: Path, state: dict[str, Any]) -> Path:
    """Put the state in the place of older versions of Megatron, which is read first."""
    torch.save(state, folder / "release" / "common.pt")
    return folder
