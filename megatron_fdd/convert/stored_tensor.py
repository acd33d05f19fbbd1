"""The entries of safetensors headers, and the dtypes in them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

# Dtypes by the names that safetensors uses.
DTYPE_OF_NAME = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Those of the parts of quantised tensors, which are no values by themselves.
_CODES = {"F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu, "U8": torch.uint8}
RAW_DTYPE_OF_NAME = {**DTYPE_OF_NAME, **_CODES}
NAME_OF_DTYPE = {dtype: name for name, dtype in RAW_DTYPE_OF_NAME.items()}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """The entry of one tensor in a safetensors header.

    Attributes:
        file: name of the file that holds the tensor.
        dtype: safetensors' name of the dtype, such as BF16.
        offset: position of the tensor's first byte in the file.
        num_bytes: how many bytes it has there.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read the entries of a file that safetensors has opened before, and has found whole."""
    # safetensors does not tell offsets, and parses the header again for every tensor.
    with path.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        shape = tuple(entry["shape"])
        tensors[name] = StoredTensor(path.name, entry["dtype"], shape, 8 + length + first, last - first)
    return tensors
