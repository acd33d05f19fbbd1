"""Unpickling of checkpoints: only objects of listed classes are made, so that no code runs from a file.

A folder of Megatron's `torch_dist` format holds two kinds of pickles: the index `.metadata`, and the objects beside
tensors (arguments, random states, extra states, what an optimizer keeps). torch (2.11) reads both without a limit. The
classes of an index are listed here; those of objects are the ones that torch accepts with `weights_only=True`, to which
Megatron adds its own, and a plug-in may add others with `torch.serialization.add_safe_globals`.
"""

from __future__ import annotations

import enum
import io
import os
import pickle
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
import torch

from megatron_fdd.host.patches.table import current, replace

_CHECKPOINT = "torch.distributed.checkpoint"
_METADATA = (
    "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
    "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
)  # fmt: skip
# Making one of these does nothing but hold values. torch's dtypes come in addition.
_INDEX_CLASSES = frozenset(
    {
        *((f"{_CHECKPOINT}.metadata", name) for name in _METADATA),
        (f"{_CHECKPOINT}.filesystem", "_StorageInfo"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),  # Python 3.13's name
        ("collections", "OrderedDict"),
    }
)
# What torch's restricted unpickler makes by itself, by name.
_ALLOWED = "torch._weights_only_unpickler._get_allowed_globals"
# Tensors whose numbers torch (2.11) looks for wherever the file says, also outside of the file; and of other devices.
_ODD_TENSORS = frozenset(
    f"torch._utils._rebuild_{kind}"
    for kind in (
        "qtensor", "sparse_tensor", "nested_tensor", "wrapper_subclass", "device_tensor_from_numpy",
        "device_tensor_from_cpu_tensor",
    )
)  # fmt: skip
# torch reads these, and takes one at most: the first overrules `weights_only=False`, the second the default.
_ONLY_WEIGHTS, _NOT_ONLY_WEIGHTS = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_TRUE = ("1", "y", "yes", "true")
# How torch's restricted unpickler (2.11) names a class that it refuses.
_REFUSED = re.compile(r"GLOBAL ([\w.]+)")

_is_trusting = False


class ForbiddenClassError(pickle.UnpicklingError):
    """A pickle names a class that is on no list; nothing was made from it."""


class _IndexUnpickler(pickle.Unpickler):
    """Python's unpickler for the listed classes of an index."""

    def find_class(self, module: str, name: str, /) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not (is_dtype or (module, name) in _INDEX_CLASSES):
            raise ForbiddenClassError(f"{module}.{name}")
        return super().find_class(module, name)


def trust_checkpoints() -> None:
    """Let this process and its children unpickle whatever a checkpoint holds, which can run code.

    For people who ask for it. Some readers ask torch for no kind of unpickling (Megatron's of `common.pt`), and get
    the restricted one unless the environment says otherwise.
    """
    global _is_trusting
    _is_trusting = True
    os.environ.pop(_ONLY_WEIGHTS, None)
    os.environ[_NOT_ONLY_WEIGHTS] = "1"
    warnings.filterwarnings("ignore", f"Environment variable {_NOT_ONLY_WEIGHTS} detected")


def is_trusting() -> bool:
    """Whether `trust_checkpoints` was called in this process."""
    return _is_trusting


def restrict_unpickling() -> None:
    """Make torch unpickle listed classes only, in this process and its children, unless checkpoints are trusted.

    Raises:
        ValueError: the environment asks torch for the opposite.
    """
    if _is_trusting:
        return
    if os.environ.get(_NOT_ONLY_WEIGHTS, "0") in _TRUE:
        raise ValueError(
            f"{_NOT_ONLY_WEIGHTS}={os.environ[_NOT_ONLY_WEIGHTS]}: lets checkpoints run code; unset it, or give "
            "--fdd-trust-checkpoint if you trust who made them"
        )
    os.environ[_ONLY_WEIGHTS] = "1"
    _narrow_objects()
    # That module uses pickle to read and to write the index, and for nothing else.
    replace(f"{_CHECKPOINT}.filesystem.pickle", SimpleNamespace(load=load_index, dump=pickle.dump))


def _narrow_objects() -> None:
    """Take from torch's lists what makes memory be read wrongly, or calls other ranks; no checkpoint here needs it."""
    allowed = {name: each for name, each in current(_ALLOWED)().items() if name not in _ODD_TENSORS}
    replace(_ALLOWED, lambda: allowed)
    safe = torch.serialization.get_safe_globals()
    kept = [each for each in safe if each is not np.dtype and not _is_distributed(each)]
    if np.dtype in safe:
        kept.append((number_dtype, "numpy.dtype"))
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(kept)


def _is_distributed(entry: Any) -> bool:
    """Whether an entry of torch's list is one of its own classes for tensors over several ranks."""
    return str(getattr(entry, "__module__", "")).startswith(("torch.distributed", "torch.nested"))


def number_dtype(text: str, _align: bool = False, _copy: bool = False) -> np.dtype:
    """Return numpy's own dtype of numbers, in place of the copy that a pickle asks `numpy.dtype` for.

    A pickle may give a copy another state, such as that its numbers are addresses of objects; to print such an array
    would follow them. numpy ignores a state for a dtype of its own.

    Raises:
        ValueError: it is no dtype of numbers, in this machine's order of bytes.
    """
    dtype = np.dtype(str(text))
    if dtype.isbuiltin != 1 or dtype.kind not in "biufc":
        raise ValueError(f"it holds an array of {text!r}, and only plain numbers are read")
    return dtype


def load_index(file: BinaryIO) -> Any:
    """Unpickle the index of a checkpoint.

    Raises:
        ForbiddenClassError: it names a class that is on no list.
        ValueError: it sets attributes of such a class itself.
    """
    if _is_trusting:
        return pickle.load(file)
    found = [getattr(sys.modules[module], name) for module, name in _INDEX_CLASSES if module in sys.modules]
    with _unchanged(found):
        return _IndexUnpickler(file).load()


@contextmanager
def _unchanged(classes: Iterable[Any]) -> Iterator[None]:
    """Refuse a pickle in the block that sets attributes of classes, or of members of enums; they are set back."""
    owners = [*classes]
    for each in [each for each in owners if isinstance(each, enum.EnumType)]:
        owners += vars(each)["_member_map_"].values()
    before = [(owner, dict(vars(owner))) for owner in owners if hasattr(owner, "__dict__")]
    try:
        yield
    finally:
        changed = [(owner, attributes) for owner, attributes in before if dict(vars(owner)) != attributes]
        for owner, attributes in changed:
            for name in vars(owner).keys() - attributes.keys():
                delattr(owner, name)
            for name, value in attributes.items():
                if vars(owner).get(name) is not value:
                    setattr(owner, name, value)
        if changed:
            raise ValueError(f"it changes {changed[0][0]!r} itself, which no checkpoint needs")


def check_object(content: bytes) -> None:
    """Refuse the bytes of an object unless they can be unpickled without running code.

    Raises:
        ForbiddenClassError: they name a class that is on no list.
        Exception: they are no saved object, or damaged; anything from torch.
    """
    if _is_trusting:
        return
    try:
        with _unchanged(
            each for each in torch.serialization.get_safe_globals() if isinstance(each, enum.EnumType)
        ):
            torch.load(io.BytesIO(content), "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = forbidden_class(error)
        if name is None:
            raise
        raise ForbiddenClassError(name) from error


def forbidden_class(error: pickle.UnpicklingError) -> str | None:
    """Return the class for which a pickle was refused, here or by torch; None where it was refused as damaged."""
    if isinstance(error, ForbiddenClassError):
        return str(error)
    found = _REFUSED.search(str(error))
    return None if found is None else found[1]


def why_forbidden(name: str) -> str:
    """Return the words behind the place where a class is named that is on no list."""
    return (
        f"names the class {name}, which is on no list of harmless classes: unpickling it could run code, and nothing "
        "was unpickled. If you trust who made this checkpoint, give --fdd-trust-checkpoint"
    )
