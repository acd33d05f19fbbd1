"""Invertible layouts of several Hugging Face tensors in one Megatron parameter.

Every transform works on the slice of one tensor-parallel rank. Cutting comes first and joining second, so that no
rank ever needs a whole tensor. `split(join(parts))` gives the parts back bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Transform(Protocol):
    """A conversion of Hugging Face parts into one Megatron tensor, and back."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Make the Megatron tensor from its Hugging Face parts."""

    def split(self, whole: Tensor) -> list[Tensor]:
        """Return the Hugging Face parts of a Megatron tensor; the inverse of `join`."""


def joined(blocks: Sequence[Tensor]) -> Tensor:
    """Put blocks one after the other in dim 0; a single one is not copied."""
    return blocks[0] if len(blocks) == 1 else torch.cat(list(blocks))


def join_blocks(transform: Transform, parts: Sequence[Tensor]) -> list[Tensor]:
    """Return `transform.join(parts)` in blocks that follow one another in dim 0: stacked parts are not copied."""
    return list(parts) if isinstance(transform, Stacked) else [transform.join(parts)]


def split_blocks(transform: Transform, blocks: Sequence[Tensor]) -> list[Tensor]:
    """Return what `transform.split` does of blocks that follow one another in dim 0: no copy where each is a part."""
    if (
        isinstance(transform, Stacked)
        and len({block.shape for block in blocks}) == 1
        and len(blocks) == transform.count
    ):
        return list(blocks)
    return transform.split(joined(blocks))


@dataclass(frozen=True, slots=True)
class Same:
    """One tensor, stored in the same way on both sides."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the only part."""
        (only,) = parts
        return only

    def split(self, whole: Tensor) -> list[Tensor]:
        """Return the tensor as the only part."""
        return [whole]


@dataclass(frozen=True, slots=True)
class Stacked:
    """Tensors of one shape, `count` of them one after the other in dim 0 (gate, up)."""

    count: int

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Put the parts one after the other in dim 0."""
        return torch.cat(list(parts))

    def split(self, whole: Tensor) -> list[Tensor]:
        """Cut dim 0 into `count` equal parts."""
        return list(whole.chunk(self.count))


@dataclass(frozen=True, slots=True)
class Alternating:
    """One tensor whose rows are gate, up, gate, up, ...; in Megatron's all rows of gate come first."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Put the even rows before the odd ones."""
        (only,) = parts
        return torch.cat([only[0::2], only[1::2]])

    def split(self, whole: Tensor) -> list[Tensor]:
        """Let the rows of both halves take turns."""
        return [torch.stack(whole.chunk(2), dim=1).flatten(0, 1)]


@dataclass(frozen=True, slots=True)
class OneRow:
    """A vector that the other side stores as a matrix of one row."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the only row of the only part."""
        (only,) = parts
        return only.squeeze(0)

    def split(self, whole: Tensor) -> list[Tensor]:
        """Return the vector as a row."""
        return [whole.unsqueeze(0)]


@dataclass(frozen=True, slots=True)
class GroupedQkv:
    """Query, key and value rows, interleaved per query group: [q ... q k v], [q ... q k v], ...

    It works on weights [rows, hidden] and biases [rows]. The number of groups follows from the shapes.
    """

    queries_per_group: int
    head_dim: int

    @property
    def _rows(self) -> list[int]:
        return [self.queries_per_group * self.head_dim, self.head_dim, self.head_dim]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Interleave the rows of query, key and value per query group."""
        groups = parts[1].shape[0] // self.head_dim
        rest = parts[0].shape[1:]
        grouped = [part.reshape(groups, rows, *rest) for part, rows in zip(parts, self._rows, strict=True)]
        return torch.cat(grouped, dim=1).flatten(0, 1)

    def split(self, whole: Tensor) -> list[Tensor]:
        """Collect the rows of query, key and value from all query groups."""
        grouped = whole.unflatten(0, (-1, sum(self._rows)))
        return [part.flatten(0, 1) for part in grouped.split(self._rows, dim=1)]


@dataclass(frozen=True, slots=True)
class FusedQkv:
    """One tensor with the query, then the key, then the value rows, interleaved by `grouped`."""

    grouped: GroupedQkv

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Interleave the rows of the one part per query group."""
        (fused,) = parts
        queries = self.grouped.queries_per_group
        rows = fused.shape[0] // (queries + 2)  # number of key rows
        return self.grouped.join(fused.split([queries * rows, rows, rows]))

    def split(self, whole: Tensor) -> list[Tensor]:
        """Put the rows of query, key and value one after the other into one part."""
        return [torch.cat(self.grouped.split(whole))]


@dataclass(frozen=True, slots=True)
class Transposed:
    """Weights stored as [in, out], in the manner of Conv1D; `inner` arranges their transposes."""

    inner: Transform

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Join the transposes of the parts."""
        return self.inner.join([part.T for part in parts])

    def split(self, whole: Tensor) -> list[Tensor]:
        """Return the transposes of the parts that `inner` splits off."""
        return [part.T for part in self.inner.split(whole)]
