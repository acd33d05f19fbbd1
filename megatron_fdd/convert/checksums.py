"""The checksum report of a conversion: what every tensor was, so that both ends can be compared."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_fdd.convert.hf_folder import read_json, write_json

CHECKSUMS_FILE = "checksums.json"
_ALGORITHM = "sha256"


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, in order; no copy where it is contiguous."""
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, in hexadecimal. Says nothing of its dtype and shape."""
    return hashlib.sha256(bytes_of(tensor)).hexdigest()


def write_checksums(folder: Path, digests: Mapping[str, str]) -> None:
    """Write the report: tensor name -> SHA-256 of its bytes, sorted by name."""
    write_json(folder / CHECKSUMS_FILE, {"algorithm": _ALGORITHM, "tensors": dict(sorted(digests.items()))})


def read_checksums(folder: Path) -> dict[str, str] | None:
    """The report in a folder, None where there is none.

    Raises:
        ValueError: the file is there and is no such report.
    """
    path = folder / CHECKSUMS_FILE
    if not path.is_file():
        return None
    content = read_json(path)
    tensors = content.get("tensors")
    if content.get("algorithm") != _ALGORITHM or not isinstance(tensors, dict):
        raise ValueError(f"{path} is no checksum report of {_ALGORITHM} digests; remove it")
    return tensors
