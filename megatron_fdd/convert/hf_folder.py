"""A Hugging Face model folder, read lazily: single or sharded safetensors, config and companion files."""

from __future__ import annotations

import copy
import math
import os
import shutil
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_fdd.convert.families.config_fields import TOKEN_IDS
from megatron_fdd.convert.families.family import HfConfig, slice_name
from megatron_fdd.convert.mapped import mapped
from megatron_fdd.convert.mcore_model import DTYPES
from megatron_fdd.convert.quantisation_methods import dequantiser_of
from megatron_fdd.convert.quantised import FIELD, Quantised
from megatron_fdd.convert.stored_tensor import DTYPE_OF_NAME, RAW_DTYPE_OF_NAME, StoredTensor, read_header
from megatron_fdd.host.field_kinds import shown, wrong_field
from megatron_fdd.host.json_file import read_json
from megatron_fdd.host.listing import listing
from megatron_fdd.host.weight_map import read_weight_map

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILES = ("config.json", "generation_config.json")


def copy_files(names: Iterable[str], source: Path, target: Path) -> list[str]:
    """Copy the files in `names` that `source` has into the folder `target`; return their names.

    Raises:
        ValueError: what has such a name is no file.
    """
    found = [name for name in names if os.path.lexists(source / name)]
    for name in found:
        if not (source / name).is_file():
            raise ValueError(
                f"{source / name} is no file (a link that leads nowhere, a pipe, a folder); fetch or copy the model "
                "again, or remove it"
            )
    if found:
        target.mkdir(parents=True, exist_ok=True)
    for name in found:
        shutil.copyfile(source / name, target / name)
    return found


class HfFolder:
    """The tensors and config of one model folder. Only headers are kept; a tensor is mapped while it is used.

    Quantised tensors are read as the values that they stand for.

    Attributes:
        stored_config: config.json, with every field.
        quantization: its field `quantization_config`.

    Raises:
        ValueError: there is no folder, no config.json or no safetensors file; or a shard is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise ValueError(
                f"--hf-model {self.path} is not a folder with a Hugging Face model; give another"
            )
        if not (self.path / CONFIG_FILES[0]).is_file():
            raise ValueError(
                f"--hf-model {self.path}: the folder has no config.json; give one with a whole model"
            )
        self.stored_config: HfConfig = read_json(self.path / CONFIG_FILES[0])
        self._check_generation_config()
        self.quantization: Any = self.stored_config.get(FIELD)

    def _check_generation_config(self) -> None:
        """Refuse a generation_config.json that an export would find broken after a training."""
        path = self.path / CONFIG_FILES[1]
        found = wrong_field(read_json(path), TOKEN_IDS) if path.exists() else None
        if found is not None:
            name, value, allowed = found
            raise ValueError(f'{path} has "{name}": {shown(value)}, which must be {allowed}; correct it')

    @cached_property
    def config(self) -> HfConfig:
        """The config of the values: config.json, without `quantization_config`.

        Raises:
            ValueError: the weights are quantised in a way that is not read here.
        """
        if self.quantization is None:
            return self.stored_config
        dequantiser_of(self.quantization)
        return {field: value for field, value in self.stored_config.items() if field != FIELD}

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor that is stored, by name, read from the headers of all files."""
        index = self.path / INDEX_FILE
        if (self.path / SINGLE_FILE).is_file():  # it goes before an index, as in transformers
            others = set(read_weight_map(index).values()) if index.is_file() else set()
            # An index alone is what save_pretrained leaves, which removes old shards.
            if others - {SINGLE_FILE} and all((self.path / file).is_file() for file in others):
                raise ValueError(
                    f"{self.path} holds {SINGLE_FILE}, and {INDEX_FILE} with other files beside it: one of them is a "
                    "left-over; remove it"
                )
            return self._header(SINGLE_FILE)
        if not index.is_file():
            raise ValueError(
                f"{self.path} holds neither {SINGLE_FILE} nor {INDEX_FILE}; other weight formats are not read: "
                "save the model with save_pretrained(..., safe_serialization=True)"
            )
        declared = read_weight_map(index)
        tensors: dict[str, StoredTensor] = {}
        for file in sorted(set(declared.values())):
            header = self._header(file)
            disputed = set(header) ^ {name for name, its_file in declared.items() if its_file == file}
            if disputed:
                raise ValueError(
                    f"{self.path / file} and {INDEX_FILE} disagree about: {listing(sorted(disputed))}"
                )
            tensors |= header
        return tensors

    def _header(self, file: str) -> dict[str, StoredTensor]:
        path = self.path / file
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ValueError(f"{path} is no regular file; copy the model again")
        try:
            with safe_open(path, framework="pt"):  # this checks the file and its length
                pass
        except FileNotFoundError:
            raise ValueError(f"{path} does not exist; {INDEX_FILE} names it") from None
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or incomplete: {error}; copy it again") from None
        return read_header(path)

    @cached_property
    def quantised(self) -> dict[str, Quantised]:
        """The tensors that others store, by name. ValueError if their parts do not fit each other."""
        if self.quantization is None:
            return {}
        return dequantiser_of(self.quantization).find(self.tensors, self.quantization)

    @cached_property
    def names(self) -> list[str]:
        """The names of all tensors that have a value: those that are stored, but not as parts of another."""
        parts = {part for each in self.quantised.values() for part in each.parts}
        return [*(name for name in self.tensors if name not in parts), *self.quantised]

    def apart(self, endings: tuple[str, ...]) -> HfFolder:
        """Return the same folder with each tensor whose name ends so taken apart along dim 0, as `slice_name` names it.

        A slice is read by itself: an expert, of a tensor with all experts of a layer.
        """
        view = copy.copy(self)
        vars(view).pop("names", None)
        view.quantised, view.tensors = {}, {}
        for name, each in self.quantised.items():
            view.quantised |= each.apart(name) if name.endswith(endings) else {name: each}
        stacked = {
            part for name, each in self.quantised.items() if name.endswith(endings) for part in each.parts
        }
        for name, stored in self.tensors.items():
            if not (name.endswith(endings) or name in stacked) or not stored.shape:
                view.tensors[name] = stored
                continue
            count, *shape = stored.shape
            size = stored.num_bytes // max(count, 1)
            view.tensors |= {
                slice_name(name, index): replace(
                    stored, shape=tuple(shape), offset=stored.offset + index * size, num_bytes=size
                )
                for index in range(count)
            }
        return view

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self.quantised[name].shape if name in self.quantised else self.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor. ValueError if it is not a floating-point dtype."""
        if name in self.quantised:
            return self.quantised[name].dtype
        stored = self.tensors[name].dtype
        if stored not in DTYPE_OF_NAME:
            raise ValueError(
                f"{self.path}: {name} is stored as {stored}; only {', '.join(DTYPE_OF_NAME)} convert"
            )
        return DTYPE_OF_NAME[stored]

    def common_dtype(self, names: Iterable[str]) -> torch.dtype:
        """Return the one dtype of some tensors.

        Raises:
            ValueError: there are several dtypes, or Megatron holds no parameters in this one.
        """
        by_dtype = {self.dtype(name): name for name in sorted(names, reverse=True)}
        if len(by_dtype) > 1:
            found = ", ".join(f"{name} is {dtype}" for dtype, name in by_dtype.items())
            raise ValueError(f"{self.path} mixes dtypes ({found}); choose one with --dtype")
        (only,) = by_dtype
        if only not in DTYPES.values():
            raise ValueError(f"{self.path} holds {only}, which Megatron does not train; choose with --dtype")
        return only

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Read a tensor: as `raw` does, or its value from its parts.

        Args:
            dtype: of the value of a quantised tensor, which is rounded once; by default `dtype(name)`.
        """
        if name in self.quantised:
            found = self.quantised[name]
            return found.value([self.raw(part) for part in found.parts], dtype or found.dtype)
        self.dtype(name)
        return self.raw(name)

    def raw(self, name: str) -> Tensor:
        """Read a stored tensor as a mapping of its part of the file; its pages leave memory together with it."""
        stored = self.tensors[name]
        if stored.dtype not in RAW_DTYPE_OF_NAME:
            raise ValueError(
                f"{self.path}: {name} is stored as {stored.dtype}, which is not read here; save the model in bfloat16"
            )
        dtype = RAW_DTYPE_OF_NAME[stored.dtype]
        size = math.prod(stored.shape) * dtype.itemsize
        try:
            raw = mapped(self.path / stored.file, stored.offset, size)
        except ValueError:
            raise ValueError(
                f"{self.path / stored.file} has become shorter since it was opened, and {name} lies behind its end; "
                "copy the model again, and let nothing write there meanwhile"
            ) from None
        return raw.view(dtype).reshape(stored.shape)
