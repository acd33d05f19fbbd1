"""Megatron checkpoint folders, read before any collective: whether one exists, whether it is whole, what it holds."""

from __future__ import annotations

import argparse
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_fdd.host.checkpoint_index import (
    check_files,
    check_format,
    check_objects,
    contents,
    read_checkpoint_index,
)
from megatron_fdd.host.damage import DAMAGE, cause_of
from megatron_fdd.host.together import together
from megatron_fdd.host.unpickling import restrict_unpickling

# What the terms of a distillation learn beside the student (`step/term_modules.py`).
TERM_PREFIX = "fdd_terms."
# The state that TransformerEngine's modules keep beside weights, numbered where experts share a module.
EXTRA_STATE = "_extra_state"
# Megatron's name for a checkpoint of weights alone: iteration 0, no optimizer and no random state to load.
RELEASE = "release"
TRACKER_FILE = "latest_checkpointed_iteration.txt"
# An iteration has fewer digits.
_LONGEST_NUMBER = 20


def has_checkpoint(directory: str) -> bool:
    """Whether `directory` claims to hold a checkpoint: its tracker file exists."""
    return (Path(directory) / TRACKER_FILE).is_file()


def read_tracker(root: str | Path) -> str | None:
    """Return what the tracker file of a folder says: an iteration, or `RELEASE`; None without such a file.

    Raises:
        ValueError: it says something else; the message goes on from the name of the folder.
    """
    tracker = Path(root) / TRACKER_FILE
    if not tracker.is_file():
        if os.path.lexists(tracker):  # Megatron would write into it
            raise ValueError(f"{TRACKER_FILE} is no regular file; remove it")
        return None
    label = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if label != RELEASE and not (label.isdecimal() and label.isascii() and len(label) < _LONGEST_NUMBER):
        raise ValueError(
            f"{TRACKER_FILE} says {label[:_LONGEST_NUMBER]!r}, not an iteration or 'release'; write the number of the "
            "newest whole iter_ folder into it"
        )
    return label


def iteration_folder(root: str | Path, iteration: int) -> Path:
    """Return where Megatron saves an iteration below a folder of --save."""
    return Path(root) / f"iter_{iteration:07d}"


def is_same_folder(one: str | None, other: str | None) -> bool:
    """Whether both name one folder, however they are written; it need not exist. None names no folder."""
    return None not in (one, other) and Path(str(one)).resolve() == Path(str(other)).resolve()


def find_checkpoint(
    directory: str,
    flag: str,
    *,
    to_plan: bool = False,
    step: int | None = None,
    leaves_objects: bool = False,
) -> Path:
    """Return the newest checkpoint under `directory`, or that of iteration `step`, after checking its files.

    Every file has its full length, and what is pickled in them runs no code, here or when Megatron loads it.

    Args:
        directory: what the user gave as `flag`.
        to_plan: true if the arguments are enough, so that it need not hold weights.
        step: the value of --ckpt-step; None or 0, as in Megatron: the newest.
        leaves_objects: whether only the index and the common state are checked, which every rank reads by itself, and
            `check_objects_together` follows before anything else is loaded. The files of thousands of ranks would
            otherwise all be opened by each of them.

    Raises:
        ValueError: there is no checkpoint, the tracker is unreadable, a file is truncated or missing, a pickle in it
            names a class that is on no list, or there are no weights.
    """
    restrict_unpickling()
    root = Path(directory)
    if not has_checkpoint(directory):
        what = "the folder does not exist"
        if root.exists():
            what = "the folder holds no Megatron checkpoint" if root.is_dir() else "a file, not a folder"
        raise ValueError(
            f"{flag} {directory}: {what} (no {TRACKER_FILE}); "
            "make one with fdd import or name the folder that a run gave to --save"
        )
    try:
        label = read_tracker(root)
    except ValueError as error:
        raise ValueError(f"{flag} {directory}: {error}") from None
    assert label is not None, "has_checkpoint has seen the file"
    path = root / label if label == RELEASE else iteration_folder(root, step or int(label))
    if step and not path.name.endswith(f"_{step:07d}"):
        raise ValueError(
            f"--ckpt-step {step}: {flag} {directory} holds a converted model alone; leave it out"
        )
    if step and not path.is_dir():
        found = ", ".join(sorted(each.name.removeprefix("iter_").lstrip("0") for each in root.glob("iter_*")))
        raise ValueError(
            f"--ckpt-step {step}: {flag} {directory} holds the iterations {found}; give one of them"
        )
    index = read_checkpoint_index(path, flag)
    check_format(path, flag)
    check_files(path, flag, index)
    check_objects(path, flag, index, only_common=leaves_objects)
    if not to_plan and not _lists_tensors(index):
        raise ValueError(
            f"{flag} {directory}: holds a model's arguments and no weights (fdd import --config-only), enough for "
            "fdd plan only; convert the model again without --config-only"
        )
    return path


def check_objects_together(checkpoints: Mapping[str, Path]) -> None:
    """Refuse checkpoints with an object that could run code when it is loaded, each rank its share of the files.

    No rank returns before every rank has found its share harmless.

    Args:
        checkpoints: the folder of an iteration, or a `release` folder, by the flag that named it.

    Collectives: one all-gather of a few words over all ranks.

    Raises:
        ValueError: names file and class. The same on every rank.
        OSError: a file cannot be read. The same on every rank.
    """
    share = slice(dist.get_rank(), None, dist.get_world_size())
    with together():
        for flag, path in checkpoints.items():
            check_objects(path, flag, read_checkpoint_index(path, flag), share=share)


def holds_weights(path: Path, flag: str) -> bool:
    """Whether the checkpoint at `path` has more than a model's arguments.

    Raises:
        ValueError: its index cannot be read.
    """
    return _lists_tensors(read_checkpoint_index(path, flag))


def term_shapes(path: Path, flag: str) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of what terms of a distillation have learned in the checkpoint at `path`.

    Raises:
        ValueError: its index cannot be read.
    """
    return {
        name: tuple(entry.size)
        for name, entry in read_checkpoint_index(path, flag).state_dict_metadata.items()
        if name.startswith(TERM_PREFIX) and isinstance(entry, TensorStorageMetadata)
    }


def read_common_state(path: Path, flag: str) -> dict[str, Any]:
    """Return what the checkpoint at `path` stores beside tensors. ValueError if it cannot be read."""
    try:
        return dist_checkpointing.load_common_state_dict(str(path))
    except DAMAGE as error:
        raise ValueError(
            f"{flag} {path}: its common state cannot be read ({cause_of(error)}); the copy is damaged; copy it again"
        ) from error


def read_checkpoint_args(path: Path, flag: str) -> argparse.Namespace:
    """Return Megatron's own arguments, as stored in the checkpoint at `path`.

    Raises:
        ValueError: the checkpoint stores none, or they cannot be read.
    """
    state = read_common_state(path, flag)
    if not isinstance(state, dict) or not isinstance(state.get("args"), argparse.Namespace):
        raise ValueError(
            f"{flag} {path}: stores no arguments, so its architecture is unknown; save it with Megatron"
        )
    return state["args"]


def check_no_spec(args: argparse.Namespace, flag: str, remedy: str) -> None:
    """Refuse a model whose layers are code to import: nothing is imported by a name out of a checkpoint.

    Args:
        args: as a checkpoint stores them.
        remedy: ends the message.

    Raises:
        ValueError: names the module and the remedy.
    """
    spec = getattr(args, "spec", None)
    if spec is not None:
        words = map(str, spec if isinstance(spec, list) else [spec])
        raise ValueError(
            f"{flag}: the model was built with --spec {' '.join(words)}, and nothing is imported by a "
            f"name out of a checkpoint; {remedy}"
        )


def read_extra_states(path: Path, flag: str) -> Iterator[bytes]:
    """Yield the saved extra state of each TransformerEngine module, a few KB at a time. Nothing is unpickled.

    Raises:
        ValueError: the checkpoint's index cannot be read.
    """
    index = read_checkpoint_index(path, flag)
    for _, _, content in contents(path, index, lambda name: name.partition("/")[0].endswith(EXTRA_STATE)):
        yield content


def read_tensor(path: Path, name: str, flag: str) -> Tensor | None:
    """Read a small tensor of the checkpoint at `path`, whole, on the CPU; None where it has none of that name.

    Collectives: none.

    Raises:
        ValueError: the index, or the tensor's bytes, cannot be read.
    """
    index = read_checkpoint_index(path, flag).storage_data
    found = sorted(
        (tuple(item.offset or ()), place.relative_path, place.offset, place.length)
        for item, place in index.items()
        if item.fqn == name
    )
    parts = []
    for _, file_name, offset, length in found:
        try:
            with (path / file_name).open("rb") as file:
                file.seek(offset)
                parts.append(torch.load(io.BytesIO(file.read(length)), "cpu", weights_only=True))
        except DAMAGE as error:
            raise ValueError(
                f"{flag} {path}: {name} cannot be read ({cause_of(error)}); the copy is damaged; copy it again"
            ) from error
    return torch.cat(parts) if parts else None


def _lists_tensors(index: Metadata) -> bool:
    return any(isinstance(entry, TensorStorageMetadata) for entry in index.state_dict_metadata.values())
