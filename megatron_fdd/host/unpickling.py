"""Unpickling of checkpoints: only objects of listed classes are made, so that no code runs from a file.

A folder of Megatron's `torch_dist` format holds two kinds of pickles: the index `.metadata`, and the objects beside
tensors (arguments, random states, extra states, what an optimizer keeps). torch (2.11) reads both without a limit. The
classes of an index are listed here; those of objects are the ones that torch accepts with `weights_only=True`, to which
Megatron adds its own, and a plug-in may add others with `torch.serialization.add_safe_globals`.
"""

from __future__ import annotations

import io
import os
import pickle
import re
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch

from megatron_fdd.host.patches.table import replace

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
# torch reads these: the first overrules `weights_only=False`, the second overrules the default.
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
    """Let this process unpickle whatever a checkpoint holds, which can run code. For people who ask for it."""
    global _is_trusting
    _is_trusting = True


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
    # That module uses pickle to read and to write the index, and for nothing else.
    replace(f"{_CHECKPOINT}.filesystem.pickle", SimpleNamespace(load=load_index, dump=pickle.dump))


def load_index(file: BinaryIO) -> Any:
    """Unpickle the index of a checkpoint.

    Raises:
        ForbiddenClassError: it names a class that is on no list.
    """
    return pickle.load(file) if _is_trusting else _IndexUnpickler(file).load()


def check_object(content: bytes) -> None:
    """Refuse the bytes of an object unless they can be unpickled without running code.

    Raises:
        ForbiddenClassError: they name a class that is on no list.
        Exception: they are no saved object, or damaged; anything from torch.
    """
    if _is_trusting:
        return
    try:
        torch.load(io.BytesIO(content), "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = _REFUSED.search(str(error))
        if found is None:
            raise
        raise ForbiddenClassError(found[1]) from error
