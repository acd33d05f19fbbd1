"""The checksum report of a conversion: a digest of every tensor, so that both ends can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from megatron_fdd.convert.families.family import whole_name
from megatron_fdd.host.buffers import Buffers
from megatron_fdd.host.json_file import read_json, write_json

CHECKSUMS_FILE = "checksums.json"
# It finds damage and tells models apart. It is no signature: who can change a tensor can change its sum.
_ALGORITHM = "xxh3_128"
_COPIES = Buffers(64 << 20)
_ON_PURPOSE = "if the weights were changed on purpose, remove that file"


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor on the CPU, in order, without a copy if it is contiguous."""
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def digest(tensor: Tensor) -> str:
    """Return the xxh3_128 of a tensor's bytes, in hexadecimal. It does not depend on dtype and shape."""
    if not tensor.is_contiguous():
        tensor = _COPIES.empty(tensor.shape, tensor.dtype).copy_(tensor)
    return xxhash.xxh3_128_hexdigest(bytes_of(tensor))


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite. It reads the tensor once and makes no copy; `digest` takes longer.

    Codes and scales in one byte are not looked at: the values that they stand for are.
    """
    if tensor.dtype.itemsize == 1:
        return True
    if tensor.dim() == 2 and tensor.T.is_contiguous():  # in its own order it is read ten times as fast
        tensor = tensor.T
    return tensor.numel() == 0 or bool(torch.stack(tensor.aminmax()).isfinite().all())


def check_finite(tensor: Tensor, where: str, remedy: str) -> None:
    """Refuse a tensor with values that are not finite: no model computes anything with it.

    Raises:
        ValueError: names it as `where` says, with `remedy`.
    """
    if not is_finite(tensor):
        bad = tensor.numel() - int(tensor.isfinite().sum())
        raise ValueError(
            f"{where}: {bad} of {tensor.numel()} values are not finite (NaN, infinite); {remedy}"
        )


@dataclass(frozen=True, slots=True)
class Checksums:
    """A report.

    Attributes:
        dtype: the dtype of the tensors, such as bfloat16; "mixed" where they differ.
        digests: name of a tensor, or of a slice of one that holds all experts of a layer -> xxh3_128 of its bytes.
    """

    dtype: str
    digests: Mapping[str, str]

    @classmethod
    def read(cls, folder: Path) -> Checksums | None:
        """Read the report in a folder; return None if it has no report of ours."""
        path = folder / CHECKSUMS_FILE
        if not path.is_file():
            return None
        content = read_json(path)
        tensors = content.get("tensors")
        if content.get("algorithm") != _ALGORITHM or not isinstance(tensors, dict):
            return None
        return cls(content.get("dtype", "mixed"), tensors)

    def write(self, folder: Path) -> None:
        """Write the report, sorted by name, into `folder`."""
        tensors = dict(sorted(self.digests.items()))
        content = {"algorithm": _ALGORITHM, "dtype": self.dtype, "tensors": tensors}
        write_json(folder / CHECKSUMS_FILE, content)

    def count(self) -> int:
        """Count the tensors; one of which slices have digests is one."""
        return len(set(map(whole_name, self.digests)))

    def count_same(self, other: Checksums | None) -> int | None:
        """Count the tensors with the same digest in `other`; return None without `other` or if its dtype differs."""
        if other is None or other.dtype != self.dtype:
            return None
        changed = {
            whole_name(name) for name, digest in self.digests.items() if other.digests.get(name) != digest
        }
        return self.count() - len(changed)

    def check(self, folder: Path, name: str, found: str) -> None:
        """Refuse a tensor of `folder` unless it agrees with this report, which lies there.

        Raises:
            ValueError: the digests differ, or the report does not list the tensor.
        """
        if name not in self.digests:
            raise ValueError(f"{folder}: {CHECKSUMS_FILE} does not list {name}; {_ON_PURPOSE}")
        if self.digests[name] != found:
            raise ValueError(
                f"{folder}: {name} is not what {CHECKSUMS_FILE} says it was: the copy is damaged, or {_ON_PURPOSE}"
            )
