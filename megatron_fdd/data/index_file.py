"""The index of a set in Megatron's format, read and checked without Megatron's reader.

Megatron's reader believes an index: of a damaged one it gives other documents, or fails during training, and an
error inside it is followed by a second one from its destructor.

`P.idx`: 9 bytes of magic, version (uint64, 1), code of the ids' type (uint8), numbers of sequences and of borders
(uint64); then for each sequence its length in ids (int32) and its first byte in `P.bin` (int64); then the borders
(int64), the sequence with which each document begins, and the number of sequences.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from megatron.core.datasets.indexed_dataset import DType

_MAGIC = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")
_BYTES_OF_SEQUENCE = 4 + 8
_BYTES_OF_BORDER = 8
# So many numbers of a mapped file are looked at together.
_CHUNK = 1 << 22


@dataclass(frozen=True, slots=True)
class IndexFile:
    """The contents of an index.

    Attributes:
        lengths: int32 [sequences], in ids; a mapped file.
        pointers: int64 [sequences], the first byte of each in the `.bin` file; a mapped file.
        dtype: of an id in the `.bin` file; an integer type.
    """

    lengths: np.ndarray
    pointers: np.ndarray
    dtype: np.dtype

    @property
    def bin_bytes(self) -> int:
        """Number of bytes that the `.bin` file must have."""
        return int(self.lengths.sum(dtype=np.int64)) * self.dtype.itemsize

    def check_pointers(self) -> None:
        """Refuse sequences that do not lie in the `.bin` file.

        Raises:
            ValueError: names the first one.
        """
        bin_bytes = self.bin_bytes
        for start in range(0, len(self.lengths), _CHUNK):
            length = self.lengths[start : start + _CHUNK].astype(np.int64)
            pointer = np.asarray(self.pointers[start : start + _CHUNK])
            # Not pointer + length > size, whose sum could overflow.
            wrong = (pointer < 0) | (pointer > bin_bytes - length * self.dtype.itemsize)
            if wrong.any():
                index = int(wrong.argmax())
                raise ValueError(
                    f"sequence {start + index} has {length[index]} ids from byte {pointer[index]} on, and the .bin "
                    f"file {bin_bytes} bytes"
                )


def read_index_file(path: str) -> IndexFile:
    """Read and check an index, all but its pointers. Its numbers stay on disk, mapped.

    Raises:
        ValueError: it is damaged; says how, without the file's name.
    """
    with open(path, "rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise ValueError(f"it has only {len(header)} bytes")
    magic, version, code, num_sequences, num_borders = _HEADER.unpack(header)
    if (magic, version) != (_MAGIC, 1):
        raise ValueError("it does not begin as an index of Megatron does")
    if code not in {each.value for each in DType}:
        raise ValueError(f"{code} is the code of no type")
    dtype = np.dtype(DType.dtype_from_code(code))
    if not np.issubdtype(dtype, np.integer):
        raise ValueError(f"its ids are of type {dtype}, not whole numbers")
    needed = _HEADER.size + num_sequences * _BYTES_OF_SEQUENCE + num_borders * _BYTES_OF_BORDER
    if os.path.getsize(path) < needed:
        raise ValueError(f"it has {os.path.getsize(path)} bytes and needs {needed}")
    pointers_at = _HEADER.size + num_sequences * 4
    lengths = mapped_numbers(path, np.int32, num_sequences, _HEADER.size)
    if lengths.min(initial=0) < 0:
        raise ValueError(f"sequence {lengths.argmin()} has {lengths.min()} ids")
    pointers = mapped_numbers(path, np.int64, num_sequences, pointers_at)
    borders = mapped_numbers(path, np.int64, num_borders, pointers_at + num_sequences * 8)
    _check_borders(borders, num_sequences)
    return IndexFile(lengths, pointers, dtype)


def mapped_numbers(path: str, dtype: npt.DTypeLike, count: int, offset: int) -> np.ndarray:
    """Map `count` numbers of a file from byte `offset` on, to be read only; nothing is mapped where there are none."""
    if count == 0:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r", offset=offset, shape=(count,))


def _check_borders(borders: np.ndarray, num_sequences: int) -> None:
    """Refuse documents that do not follow each other from the first sequence to the last."""
    is_whole = len(borders) > 0 and borders[0] == 0 and borders[-1] == num_sequences
    parts = (borders[start : start + _CHUNK + 1] for start in range(0, len(borders), _CHUNK))
    if not is_whole or any(bool((np.diff(part) < 0).any()) for part in parts):
        raise ValueError(f"its documents do not follow each other over {num_sequences} sequences")
