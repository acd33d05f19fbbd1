"""What an import keeps beside its checkpoint for the way back, byte for byte: tensors without a place, and scales."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_fdd.convert.checksums import Checksums, check_finite, digest
from megatron_fdd.convert.families.family import Family, HfConfig
from megatron_fdd.convert.hf_folder import CONFIG_FILES, HfFolder, copy_files
from megatron_fdd.convert.hf_writer import TensorSpec, parse_size, plan_shards, write_index, write_shard
from megatron_fdd.host.json_file import write_json

LEFT_OUT_FOLDER = "left-out"
SCALES_FOLDER = "quantised"
CODES_FILE = "codes.json"
PROCESSOR_FILES = (
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    "chat_template.json",
)
"""What transformers needs beside a tokenizer for models of more than text."""
_SHARD = "5GB"


def write_left_out(source: HfFolder, names: Sequence[str], folder: Path) -> dict[str, str]:
    """Write tensors of `source` byte for byte, quantised ones in their parts, into a new model folder.

    Returns:
        The checksum of each that is not quantised.

    Raises:
        ValueError: one is not what the source's `checksums.json` says, or has values that are not finite.
    """
    for name in names:  # or an export would refuse it after the training
        check_finite(source.read(name), f"{source.path}: {name}", "take other weights")
    quantised, expected = source.quantised, Checksums.read(source.path)
    stored = [part for name in names for part in (quantised[name].parts if name in quantised else (name,))]
    digests = write_stored(source, stored, folder)
    if expected is not None:
        for name, written in digests.items():
            expected.check(source.path, name, written)
    Checksums("mixed", digests).write(folder)
    write_json(folder / CONFIG_FILES[0], source.stored_config)
    copy_files(PROCESSOR_FILES, source.path, folder)
    return {name: digests[name] for name in names if name not in quantised}


def write_stored(source: HfFolder, stored: Sequence[str], folder: Path) -> dict[str, str]:
    """Write stored tensors of `source` byte for byte into a new folder; return the checksum of each."""
    folder.mkdir()
    specs = [TensorSpec(name, source.raw(name).dtype, source.tensors[name].shape) for name in stored]
    shards, digests = plan_shards(specs, parse_size(_SHARD)), {}
    for shard in shards:
        for spec, written in write_shard(folder, shard, (source.raw(spec.name) for spec in shard.tensors)):
            digests[spec.name] = written
    write_index(folder, shards)
    return digests


def write_scales(source: HfFolder, names: Collection[str], folder: Path) -> None:
    """Write what the quantised tensors among `names` need beside their codes, and what the codes look like.

    Args:
        folder: a new one; it gets the configs of `source` too.
    """
    kept = {name: each for name, each in source.quantised.items() if name in names}
    write_stored(source, [part for each in kept.values() for part in each.parts[1:]], folder)
    copy_files(CONFIG_FILES, source.path, folder)
    codes = {each.parts[0]: source.tensors[each.parts[0]] for each in kept.values()}
    write_json(folder / CODES_FILE, {name: [codes[name].dtype, *codes[name].shape] for name in codes})


class LeftOutTensors:
    """The tensors that an import kept beside its checkpoint.

    Raises:
        ValueError: the folder is damaged.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self._folder = HfFolder(folder)
            self.names = sorted(self._folder.names)
        except ValueError as error:
            raise ValueError(
                f"{folder}, which the import kept beside its checkpoint, is damaged ({error}); copy it from there again"
            ) from error
        self._sums = Checksums.read(folder)

    @property
    def config(self) -> HfConfig:
        """The config.json of the imported folder."""
        return self._folder.config

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._folder.shape(name)

    def fit(self, family: Family, config: HfConfig) -> bool:
        """Whether a model of this config has a place for all of them."""
        return family.left_out_names(config, self.names) == self.names

    def check_origin(self, imported: Checksums) -> None:
        """Refuse what was kept of another model.

        Args:
            imported: the report of the import whose model is exported.

        Raises:
            ValueError: names a tensor that this import did not keep, or kept with other bytes.
        """
        for name in set(self.names) - set(self._folder.quantised):
            found = None if self._sums is None else self._sums.digests.get(name)
            found = found or digest(self._folder.raw(name))
            if imported.digests.get(name) != found:
                raise ValueError(
                    f"{self._folder.path} is of another model: its {name} is not what the import had; copy the folder "
                    "from beside the checkpoint of that import"
                )

    def specs(self, dtype: torch.dtype) -> Iterator[TensorSpec]:
        """Yield every tensor as it will be written: in its own dtype, and in `dtype` if it is quantised."""
        for name in self.names:
            own = dtype if name in self._folder.quantised else self._folder.dtype(name)
            yield TensorSpec(name, own, self._folder.shape(name))

    def read(self, spec: TensorSpec) -> Tensor:
        """Return the value of a tensor. ValueError if its bytes are not those that the import wrote."""
        quantised = self._folder.quantised.get(spec.name)
        for part in quantised.parts if quantised else (spec.name,):
            if self._sums is not None:
                self._sums.check(self._folder.path, part, digest(self._folder.raw(part)))
        return self._folder.read(spec.name, spec.dtype)
