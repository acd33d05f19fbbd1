"""The tensors of a student, each cut out of one of its teacher's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fdd.convert.derived_weights import Derived
from megatron_fdd.convert.families.family import Family, HfConfig, WeightRow
from megatron_fdd.convert.families.transforms import Transposed
from megatron_fdd.convert.hf_folder import HfFolder
from megatron_fdd.convert.hf_writer import TensorSpec
from megatron_fdd.convert.kept_parts import KeptParts
from megatron_fdd.convert.parameter_axes import axes_of


@dataclass(frozen=True, slots=True)
class _Cut:
    """A selection of a tensor's entries.

    Attributes:
        kept: by dim, the numbers of those that are kept.
        scale: what they are multiplied by.
    """

    kept: dict[int, Tensor]
    scale: float = 1.0

    def __call__(self, parts: Iterator[Tensor]) -> Tensor:
        value = next(parts)
        for dim, numbers in self.kept.items():
            value = value.index_select(dim, numbers)
        return value if self.scale == 1.0 else (value.float() * self.scale).to(value.dtype)

    def shape(self, before: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of what is kept of a tensor."""
        return tuple(len(self.kept[dim]) if dim in self.kept else size for dim, size in enumerate(before))


def cut_rows(folder: HfFolder, family: Family, config: HfConfig, kept: KeptParts) -> list[Derived]:
    """List the student's tensors, in the order of an export.

    Args:
        folder: the teacher's, with its experts apart.
        family: its family, as the folder stores it.
        config: the student's.

    Raises:
        ValueError: as in `axes_of` and `KeptParts.along`.
    """
    row_of = {row.mcore: row for row in family.rows(folder.config)}
    cut = [
        tensor
        for row in family.rows(config)
        if row.sources
        for tensor in _cut_row(folder, kept, row_of[kept.source_of(row.mcore)], row)
    ]
    beside = family.left_out_names(folder.config, folder.names) if family.keeps_left_out else []
    return cut + [
        Derived(TensorSpec(name, folder.dtype(name), folder.shape(name)), (name,)) for name in beside
    ]


def _cut_row(folder: HfFolder, kept: KeptParts, old: WeightRow, new: WeightRow) -> Iterator[Derived]:
    """Yield the tensors of one Megatron parameter."""
    shapes = [folder.shape(name) for name in old.sources]
    cuts = _cuts(kept, old, new, shapes) if kept.entries else [_Cut({}) for _ in shapes]
    for name, source, shape, cut in zip(new.sources, old.sources, shapes, cuts, strict=True):
        spec = TensorSpec(name, folder.dtype(source), cut.shape(shape))
        yield Derived(spec, (source,), cut if cut.kept else None)


def _cuts(kept: KeptParts, old: WeightRow, new: WeightRow, shapes: list[tuple[int, ...]]) -> list[_Cut]:
    """Return what is kept of each tensor of a parameter."""
    axes = axes_of(old.mcore)
    is_matrix = len(axes) == 2
    out_dim = int(isinstance(old.transform, Transposed)) if is_matrix else len(shapes[0]) - 1
    num_rows = sum(shape[out_dim] for shape in shapes)
    rows = kept.along(axes[0], old.mcore, num_rows)
    cuts = [_Cut({}, kept.scales.get(old.mcore, 1.0)) for _ in shapes]
    if rows is not None:
        for cut, places in zip(cuts, _places(old, new, rows, num_rows, is_matrix), strict=True):
            cut.kept[out_dim] = places
    if is_matrix:
        columns = kept.along(axes[1], old.mcore, shapes[0][1 - out_dim])
        if columns is not None:
            for cut in cuts:
                cut.kept[1 - out_dim] = columns
    return cuts


def _places(old: WeightRow, new: WeightRow, rows: Tensor, num_rows: int, is_matrix: bool) -> Iterator[Tensor]:
    """Yield for each tensor where it has those of a parameter's rows that are kept.

    The transforms are run on the numbers of rows in place of weights.
    """
    numbers = torch.arange(num_rows)[:, None] if is_matrix else torch.arange(num_rows)
    before, after = old.transform.split(numbers), new.transform.split(numbers[rows])
    for theirs, ours in zip(before, after, strict=True):
        place_of = torch.full((num_rows,), -1)
        place_of[theirs.flatten()] = torch.arange(theirs.numel())
        places = place_of[ours.flatten()]
        assert (places >= 0).all(), f"{new.mcore}: a row moved to another tensor"
        yield places
