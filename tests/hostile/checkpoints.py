"""Small `torch_dist` folders, and payloads at every place of one that is unpickled."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core import dist_checkpointing
from numpy._core.multiarray import _reconstruct
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata

from megatron_fdd.host import unpickling

# The class that a refusal must name: what a payload calls.
CLASS = "posix.mkdir"
# An object that does nothing, of a class that is on no list.
UNLISTED = Fraction(1, 3)
WEIGHT = "embedding.word_embeddings.weight"
COMMON = "common_state/shard_0_1"
# The objects beside tensors, by their names in Megatron's checkpoints.
OBJECTS = (
    COMMON,
    "rng_state/shard_0.0_1.1",
    "rerun_state_machine_state/shard_0_1",
    "optimizer.param_groups/shard_0_1",
    "decoder.layers.0.mlp.linear_fc1._extra_state/shard_0_1",
)


@dataclass(frozen=True)
class Payload:
    """An object whose unpickling makes a folder: the sign that code ran."""

    sign: Path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.sign),)


@dataclass(frozen=True)
class Made:
    """An object that is pickled as what `__reduce__` returns: a function, its arguments, and a state."""

    how: tuple[Any, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        return self.how


def _array(dtype: Any) -> Made:
    return Made((_reconstruct, (np.ndarray, (0,), b"b"), (1, (2,), dtype, False, b"A" * 8)))


_BYTES = torch.storage.TypedStorage(wrap_storage=torch.UntypedStorage(16), dtype=torch.qint8, _internal=True)
# Objects of harmless classes that are not harmless, and what is said: to print the first two ends the process.
ODD_OBJECTS: dict[str, tuple[Any, str]] = {
    "numbers that are addresses": (
        _array(Made((np.dtype, ("u4", False, True), (3, "<", (np.dtype("O"), (1,)), None, None, -1, -1, 0)))),
        "it holds an array of 'O8', and only plain numbers are read",
    ),
    "a tensor outside of the file": (
        Made(
            (
                torch._utils._rebuild_qtensor,
                (_BYTES, 2**40, (2,), (1,), (torch.per_tensor_affine, 1.0, 0), False, {}),
            )
        ),
        "names the class torch._utils._rebuild_qtensor",
    ),
    "a member of an enum with another value": (
        Made((signal.Signals, (9,), {"_value_": 5})),
        "it changes <Signals.SIGKILL: 9> itself",
    ),
}
# An index that replaces a method of a class while it is read: PosixPath.is_file = OrderedDict.
CHANGED_CLASS = b"\x80\x02cpathlib\nPosixPath\nN}X\x07\x00\x00\x00is_fileccollections\nOrderedDict\ns\x86b."


def make(folder: Path, **changes: Any) -> Path:
    """Write a checkpoint with one weight and all kinds of objects.

    Args:
        changes: values in place of objects, by their names.
    """
    release = folder / "release"
    objects: dict[str, Any] = {name: {"state": [1, 2.5, "text"]} for name in OBJECTS}
    objects[COMMON] = [{"args": argparse.Namespace(num_layers=2, spec=None), "iteration": 0}]
    state = {WEIGHT: torch.arange(6.0).reshape(3, 2), **objects, **changes}
    writer = torch_checkpoint.FileSystemWriter(release)
    planner = torch_checkpoint.DefaultSavePlanner(flatten_state_dict=False)
    torch_checkpoint.save(state, storage_writer=writer, planner=planner, no_dist=True)
    (release / "metadata.json").write_text(
        json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    )
    (folder / "latest_checkpointed_iteration.txt").write_text("release")
    return folder


def joined(first: Path, *others: Path) -> Path:
    """Add the objects of other folders to the first, in files of their own, as further ranks would have saved them."""
    release = first / "release"
    index = pickle.loads((release / ".metadata").read_bytes())
    for number, other in enumerate(others, 1):
        name = f"__{number}_0.distcp"
        (other / "release/__0_0.distcp").rename(release / name)
        for item, place in pickle.loads((other / "release/.metadata").read_bytes()).storage_data.items():
            if item.fqn != WEIGHT:
                moved = dataclasses.replace(item, fqn=f"{item.fqn}.{number}")
                index.storage_data[moved] = dataclasses.replace(place, relative_path=name)
                index.state_dict_metadata[moved.fqn] = BytesStorageMetadata()
    (release / ".metadata").write_bytes(pickle.dumps(index))
    return first


def with_index(folder: Path, change: Callable[[Any], Any]) -> Path:
    """Replace the index by what `change` makes of it, or changes in it in place."""
    path = folder / "release" / ".metadata"
    index = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(change(index) or index))
    return folder


def _planted_in_index(folder: Path, planted: object) -> None:
    def plant(index: Any) -> None:
        index.planner_data = planted

    with_index(make(folder), plant)


def _planted_in_common(folder: Path, planted: object) -> None:
    torch.save({"args": argparse.Namespace(seed=planted)}, make(folder) / "release" / "common.pt")


# Each makes a folder in which a given object is pickled, and names the place.
PLACES: dict[str, tuple[Callable[[Path, object], object], str]] = {
    "whole index": (lambda folder, planted: with_index(make(folder), lambda _: planted), r"\.metadata"),
    "part of the index": (_planted_in_index, r"\.metadata"),
    "common.pt of older versions": (_planted_in_common, r"common\.pt"),
    **{
        name: (
            lambda folder, planted, name=name: make(folder, **{name: [{"args": planted}]}),
            rf"__0_0\.distcp: {name}",
        )
        for name in OBJECTS
    },
}


@contextmanager
def untrusting() -> Iterator[None]:
    """Begin a block without trust in checkpoints, and forget behind it that it trusted them."""
    unpickling.restrict_unpickling()
    with patch.object(unpickling, "_is_trusting", False), patch.dict(os.environ):
        yield


def everything(path: Path) -> list[Any]:
    """Return all that is pickled in a folder, as torch and Megatron read it for a training."""
    index = torch_checkpoint.FileSystemReader(path).read_metadata()
    objects = {
        name: None
        for name, entry in index.state_dict_metadata.items()
        if isinstance(entry, BytesStorageMetadata)
    }
    torch_checkpoint.load(objects, storage_reader=torch_checkpoint.FileSystemReader(path), no_dist=True)
    return [index.planner_data, dist_checkpointing.load_common_state_dict(str(path)), objects]


def _at(**changes: object) -> Callable[[Any], None]:
    """Return a change of an index: the first entry's place gets other values."""

    def change(index: Any) -> None:
        place = next(iter(index.storage_data.values()))
        for name, value in changes.items():
            object.__setattr__(place, name, value)

    return change


def _with(**changes: object) -> Callable[[Any], None]:
    """Return a change of an index: the entry of a weight gets other values."""

    def change(index: Any) -> None:
        for name, value in changes.items():
            setattr(index.state_dict_metadata[WEIGHT], name, value)

    return change


def _chunk(offset: int, size: int) -> list[Any]:
    return [ChunkStorageMetadata(torch.Size([offset, 0]), torch.Size([size, 1]))]


def _with_dtype(index: Any) -> None:
    index.state_dict_metadata[WEIGHT].properties.dtype = "float32"


# Each makes an index that no torch has written, and what is said of it.
INDICES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a number": (lambda _: 7, "no index of a checkpoint"),
    "a dictionary": (lambda index: {"storage_data": {}}, "no index of a checkpoint"),
    "a file elsewhere": (
        _at(relative_path="../../secret"),
        r"'\.\./\.\./secret', which is no file of this folder",
    ),
    "an absolute file": (_at(relative_path="/etc/passwd"), "'/etc/passwd', which is no file of this folder"),
    "before the file": (_at(offset=-5), "lies at -5"),
    "a length in words": (_at(length="many"), "has 'many' bytes"),
    "a dtype in words": (_with_dtype, "the dtype 'float32'"),
    "a huge tensor": (_with(size=torch.Size([2**40, 2**40])), "has the shape torch.Size"),
    "chunks in words": (_with(chunks="abc"), "has a chunk 'abc'"),
    "a chunk of no type": (_with(chunks=None), "has a chunk None"),
    "a huge chunk": (_with(chunks=_chunk(0, 2**40)), "has a chunk ChunkStorageMetadata"),
    "a chunk before its tensor": (_with(chunks=_chunk(-1, 1)), "has a chunk ChunkStorageMetadata"),
}
