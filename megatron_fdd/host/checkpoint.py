"""Megatron checkpoint folders, read before any collective: whether one exists, whether it is whole, what it holds."""

from __future__ import annotations

import argparse
import io
import pickle
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

# What reading a damaged checkpoint raises: anything from pickle, or torch's own class, which is not an Exception.
DAMAGE = (Exception, CheckpointException)
# Entries of a training checkpoint that are not weights.
_NOT_WEIGHTS = ("optimizer", "chained_", "rng_state", "rerun_state_machine", "opt_param_scheduler")
# What the terms of a distillation learn beside the student (`step/term_modules.py`).
TERM_PREFIX = "fdd_terms."
# The state that TransformerEngine's modules keep beside weights, numbered where experts share a module.
EXTRA_STATE = "_extra_state"
# Megatron's name for a checkpoint of weights alone: iteration 0, no optimizer and no random state to load.
RELEASE = "release"
# Longer messages are cut: Megatron lists every tensor of a model whose names it does not find.
_LONGEST_CAUSE = 300
# The norm before a mixture of experts, as Megatron's local and TransformerEngine's modules name it.
_EXPERT_NORM = ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
TRACKER_FILE = "latest_checkpointed_iteration.txt"


def has_checkpoint(directory: str) -> bool:
    """Whether `directory` claims to hold a checkpoint: its tracker file exists."""
    return (Path(directory) / TRACKER_FILE).is_file()


def is_same_folder(one: str | None, other: str | None) -> bool:
    """Whether both name one folder, however they are written; it need not exist. None names no folder."""
    return None not in (one, other) and Path(str(one)).resolve() == Path(str(other)).resolve()


def find_checkpoint(directory: str, flag: str, *, to_plan: bool = False) -> Path:
    """Return the newest checkpoint under `directory`, after checking that every file has its full length.

    Args:
        directory: what the user gave as `flag`.
        to_plan: true if the arguments are enough, so that it need not hold weights.

    Raises:
        ValueError: there is no checkpoint, the tracker is unreadable, a file is truncated or missing, or there are
            no weights.
    """
    root = Path(directory)
    if not has_checkpoint(directory):
        what = "the folder does not exist"
        if root.exists():
            what = "the folder holds no Megatron checkpoint" if root.is_dir() else "a file, not a folder"
        raise ValueError(
            f"{flag} {directory}: {what} (no {TRACKER_FILE}); "
            "make one with fdd import or name the folder that a run gave to --save"
        )
    label = (root / TRACKER_FILE).read_text().strip()
    if label != RELEASE and not label.isdigit():
        raise ValueError(
            f"{flag} {directory}: {TRACKER_FILE} says {label!r}, not an iteration or 'release'; "
            "write the number of the newest whole iter_ folder into it"
        )
    path = root / (label if label == RELEASE else f"iter_{int(label):07d}")
    index = _read_index(path, flag)
    _check_files(path, flag, index)
    if not to_plan and not _lists_tensors(index):
        raise ValueError(
            f"{flag} {directory}: holds a model's arguments and no weights (fdd import --config-only), enough for "
            "fdd plan only; convert the model again without --config-only"
        )
    return path


def holds_weights(path: Path, flag: str) -> bool:
    """Whether the checkpoint at `path` has more than a model's arguments.

    Raises:
        ValueError: its index cannot be read.
    """
    return _lists_tensors(_read_index(path, flag))


def term_shapes(path: Path, flag: str) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of what terms of a distillation have learned in the checkpoint at `path`.

    Raises:
        ValueError: its index cannot be read.
    """
    return {
        name: tuple(entry.size)
        for name, entry in _read_index(path, flag).state_dict_metadata.items()
        if name.startswith(TERM_PREFIX) and isinstance(entry, TensorStorageMetadata)
    }


def read_checkpoint_args(path: Path, flag: str) -> argparse.Namespace:
    """Return Megatron's own arguments, as stored in the checkpoint at `path`.

    Raises:
        ValueError: the checkpoint stores none, or they cannot be read.
    """
    try:
        state = dist_checkpointing.load_common_state_dict(str(path))
    except DAMAGE as error:
        raise ValueError(
            f"{flag} {path}: its common state cannot be read ({cause_of(error)}); the copy is damaged"
        ) from error
    if "args" not in state:
        raise ValueError(
            f"{flag} {path}: stores no arguments, so its architecture is unknown; save it with Megatron"
        )
    return state["args"]


def read_extra_states(path: Path, flag: str) -> Iterator[bytes]:
    """Yield the saved extra state of each TransformerEngine module, a few KB at a time. Nothing is unpickled.

    The files are read one after the other, and each is opened once: with experts there are thousands of states.

    Raises:
        ValueError: the checkpoint's index cannot be read.
    """
    places: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for item, place in _read_index(path, flag).storage_data.items():
        if item.fqn.partition("/")[0].endswith(EXTRA_STATE):
            places[place.relative_path].append((place.offset, place.length))
    for name, spans in sorted(places.items()):
        with (path / name).open("rb") as file:
            for offset, length in sorted(spans):
                file.seek(offset)
                yield file.read(length)


def read_tensor(path: Path, name: str, flag: str) -> Tensor | None:
    """Read a small tensor of the checkpoint at `path`, whole, on the CPU; None where it has none of that name.

    Collectives: none.

    Raises:
        ValueError: the index, or the tensor's bytes, cannot be read.
    """
    index = _read_index(path, flag).storage_data
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
                f"{flag} {path}: {name} cannot be read ({cause_of(error)}); the copy is damaged, copy it again"
            ) from error
    return torch.cat(parts) if parts else None


def other_name(key: str) -> str:
    """Return the second name that a weight can have in a checkpoint; most weights have none and keep their own.

    Megatron's local modules and TransformerEngine's give the norm before a mixture of experts different names, and
    each looks only for its own name. A conversion writes both.
    """
    for name, other in (_EXPERT_NORM, _EXPERT_NORM[::-1]):
        if name in key:
            return key.replace(name, other)
    return key


def use_stored_names(sharded: Mapping[str, ShardedBase], stored: Collection[str]) -> None:
    """Make the entries of a model ask for the names under which the checkpoint stores its weights."""
    for entry in sharded.values():
        if isinstance(entry, ShardedTensor) and entry.key not in stored and other_name(entry.key) in stored:
            entry.key = other_name(entry.key)


def listing(names: list[str], limit: int = 8) -> str:
    """Return the first names, and how many more there are."""
    if not names:
        return "none"
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def weights_only(keys: Iterable[str]) -> list[str]:
    """Leave out optimizer and other training state, empty extra state, and what is never built for use.

    That is multi-token prediction, and what the terms of a distillation have learned.
    """
    left_out = (*_NOT_WEIGHTS, "mtp.", TERM_PREFIX)
    return sorted(key for key in keys if not key.startswith(left_out) and not key.endswith(EXTRA_STATE))


def cause_of(error: BaseException) -> str:
    """Return in one line what went wrong on the first rank that failed, without the tracebacks that torch adds."""
    if isinstance(error, CheckpointException):
        if not error.failures:  # Megatron's writer reports the failure on rank 0 only
            return "rank 0 knows why"
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, pickle.UnpicklingError):  # torch's message is about safety
        return "its bytes hold no saved tensors"
    text = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
    line = text.splitlines()[0]
    return line if len(line) <= _LONGEST_CAUSE else line[:_LONGEST_CAUSE] + " ..."


def _read_index(path: Path, flag: str) -> Metadata:
    """Return the index of torch's checkpoints: every entry, and where its bytes are."""
    index_path = path / ".metadata"
    if not index_path.is_file():
        raise ValueError(f"{flag} {path}: .metadata is missing; the save or the copy was interrupted")
    try:
        with index_path.open("rb") as file:
            return pickle.load(file)
    except Exception as error:
        raise ValueError(f"{flag} {path}: .metadata cannot be read ({error}); the copy is damaged") from error


def _lists_tensors(index: Metadata) -> bool:
    return any(isinstance(entry, TensorStorageMetadata) for entry in index.state_dict_metadata.values())


def _check_files(path: Path, flag: str, index: Metadata) -> None:
    """Refuse a checkpoint unless every byte to which its index points is on disk."""
    needed: dict[str, int] = {}
    for item in index.storage_data.values():
        needed[item.relative_path] = max(needed.get(item.relative_path, 0), item.offset + item.length)
    for name, length in sorted(needed.items()):
        file_path = path / name
        size = file_path.stat().st_size if file_path.is_file() else 0
        if size < length:
            raise ValueError(
                f"{flag} {path}: {name} has {size} bytes and needs {length}; "
                "the checkpoint is truncated, copy or save it again"
            )
