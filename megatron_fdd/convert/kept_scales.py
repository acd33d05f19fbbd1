"""The export of a model with the codes and scales of the quantised folder that was imported."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_fdd.convert.families.family import HfConfig
from megatron_fdd.convert.hf_folder import HfFolder
from megatron_fdd.convert.hf_writer import Shard, TensorSpec
from megatron_fdd.convert.left_out import CODES_FILE
from megatron_fdd.convert.quantisation_methods import dequantiser_of
from megatron_fdd.convert.quantised import FIELD, Quantised
from megatron_fdd.convert.stored_tensor import RAW_DTYPE_OF_NAME, StoredTensor
from megatron_fdd.convert.table_export import TableExport
from megatron_fdd.host.json_file import read_json


@dataclass(frozen=True, slots=True)
class QuantisedExport:
    """A model to be written with the codes and scales that the imported folder had.

    Attributes:
        table: the model as values.
        scales: the folder that `write_scales` wrote.
        quantised: its tensors that the model has.
        codes: what is stored first of each.
    """

    table: TableExport
    scales: HfFolder
    quantised: dict[str, Quantised]
    codes: dict[str, StoredTensor]

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
        for spec in self.table.specs():
            if spec.name in self.quantised:
                code = self.quantised[spec.name].parts[0]
                yield TensorSpec(code, RAW_DTYPE_OF_NAME[self.codes[code].dtype], self.codes[code].shape)
            else:
                yield spec
        for part in (part for each in self.quantised.values() for part in each.parts[1:]):
            stored = self.scales.tensors[part]
            yield TensorSpec(part, RAW_DTYPE_OF_NAME[stored.dtype], stored.shape)

    def read(self, shard: Shard) -> Iterator[Tensor]:
        """Yield the tensors of one file.

        Raises:
            ValueError: a value has no codes with these scales: it is not the imported one.
        """
        of_codes = {each.parts[0]: name for name, each in self.quantised.items()}
        names = [of_codes.get(spec.name, spec.name) for spec in shard.tensors]
        by_name = {spec.name: spec for spec in self.table.specs()}
        values = self.table.read(Shard(shard.file, tuple(by_name[name] for name in names if name in by_name)))
        for name in names:
            if name not in by_name:
                yield self.scales.raw(name)
            elif name in self.quantised:
                yield self._codes(name, next(values))
            else:
                yield next(values)

    def _codes(self, name: str, value: Tensor) -> Tensor:
        found = self.quantised[name]
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
        ValueError: there is none.
    """
    if folder is None:
        raise ValueError(
            "--quantised: no scales lie beside the checkpoint (quantised/): import a quantised folder, or leave the "
            "flag out"
        )
    scales = HfFolder(folder)
    codes = {
        name: StoredTensor("", dtype, tuple(shape), 0, 0)
        for name, (dtype, *shape) in read_json(folder / CODES_FILE).items()
    }
    found = dequantiser_of(scales.quantization).find({**codes, **scales.tensors}, scales.quantization)
    names = {spec.name for spec in table.specs()}
    return QuantisedExport(
        table, scales, {name: each for name, each in found.items() if name in names}, codes
    )
