"""The export of a model with the codes and scales of the quantised folder that was imported."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_fdd.convert.families.family import HfConfig
from megatron_fdd.convert.hf_folder import HfFolder
from megatron_fdd.convert.hf_writer import TensorSpec
from megatron_fdd.convert.left_out import CODES_FILE
from megatron_fdd.convert.quantised import FIELD
from megatron_fdd.convert.stored_tensor import RAW_DTYPE_OF_NAME, StoredTensor
from megatron_fdd.convert.table_export import TableExport
from megatron_fdd.host.json_file import read_json


@dataclass(frozen=True, slots=True)
class QuantisedExport:
    """A model to be written with the codes and scales that the imported folder had.

    Attributes:
        table: the model as values.
        scales: the folder that `write_scales` wrote, with entries of the codes, whose bytes it lacks.
        values: the tensors of the table, by name, in its order.
    """

    table: TableExport
    scales: HfFolder
    values: dict[str, TensorSpec]

    @property
    def config(self) -> HfConfig:
        """The model's config with that of the method."""
        return {**self.table.config, FIELD: self.scales.quantization}

    @property
    def dtype(self) -> torch.dtype:
        """That of the values."""
        return self.table.dtype

    def specs(self) -> Iterator[TensorSpec]:
        """Yield every tensor, in the order of the table; scales come last."""
        for spec in self.values.values():
            if spec.name in self.scales.quantised:
                code = self.scales.quantised[spec.name].parts[0]
                stored = self.scales.tensors[code]
                yield TensorSpec(code, RAW_DTYPE_OF_NAME[stored.dtype], stored.shape)
            else:
                yield spec
        for part in (part for each in self.scales.quantised.values() for part in each.parts[1:]):
            stored = self.scales.tensors[part]
            yield TensorSpec(part, RAW_DTYPE_OF_NAME[stored.dtype], stored.shape)

    def read(self, specs: Iterable[TensorSpec]) -> Generator[Tensor]:
        """Yield tensors in this order.

        Raises:
            ValueError: a value has no codes with these scales: it is not the imported one.
        """
        of_codes = {each.parts[0]: name for name, each in self.scales.quantised.items()}
        names = [of_codes.get(spec.name, spec.name) for spec in specs]
        values = self.table.read([self.values[name] for name in names if name in self.values])
        for name in names:
            if name not in self.values:
                yield self.scales.raw(name)
            elif name in self.scales.quantised:
                yield self._codes(name, next(values))
            else:
                yield next(values)

    def _codes(self, name: str, value: Tensor) -> Tensor:
        found = self.scales.quantised[name]
        others = [self.scales.raw(part) for part in found.parts[1:]]
        codes = found.codes(value, others)
        if not torch.equal(found.value([codes, *others], value.dtype), value):
            raise ValueError(
                f"--quantised: {name} is not what was imported, and the kept scales do not fit it; leave the flag out, "
                "and quantise the export with another program"
            )
        return codes


def quantised_export(table: TableExport, folder: Path | None) -> QuantisedExport:
    """Return the export with codes and scales.

    Args:
        folder: the one that `write_scales` wrote, if there is one.

    Raises:
        ValueError: there is none, values are not exact, or the model does not have all its tensors.
    """
    if folder is None:
        raise ValueError(
            "--quantised: no scales lie beside the checkpoint (quantised/): import a quantised folder, or leave the "
            "flag out"
        )
    if table.dtype is torch.float16:
        raise ValueError(
            "--quantised: the checkpoint is in float16, which rounds small values to 0, so that their codes are not "
            "known; leave the flag out, or import the folder again with another --dtype"
        )
    scales, values = HfFolder(folder), {spec.name: spec for spec in table.specs()}
    codes = {
        name: StoredTensor("", dtype, tuple(shape), 0, 0)
        for name, (dtype, *shape) in read_json(folder / CODES_FILE).items()
    }
    scales.tensors = {**codes, **scales.tensors}
    # The table has the slices of some: an expert, of a tensor with all experts of a layer.
    scales = scales.apart(tuple(name for name in scales.quantised if name not in values))
    absent = sorted(set(scales.quantised) - set(values))
    if absent:
        raise ValueError(
            f"--quantised: {absent[0]} was quantised in the imported folder, and the export has no such tensor; leave "
            "the flag out"
        )
    return QuantisedExport(table, scales, values)
