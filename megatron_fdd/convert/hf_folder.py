"""A Hugging Face model folder, read lazily: single or sharded safetensors, config and companion files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_fdd.convert.families.family import HfConfig

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILES = ("config.json", "generation_config.json")
# As safetensors names them.
DTYPE_OF_NAME = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAME_OF_DTYPE = {dtype: name for name, dtype in DTYPE_OF_NAME.items()}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. ValueError names the file when it is missing, malformed or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write as Hugging Face does: two spaces, sorted as given, a newline at the end."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_files(names: Iterable[str], source: Path, target: Path) -> list[str]:
    """Copy those of `names` that `source` has into the folder `target`; returns their names."""
    found = [name for name in names if (source / name).is_file()]
    if found:
        target.mkdir(parents=True, exist_ok=True)
    for name in found:
        shutil.copyfile(source / name, target / name)
    return found


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """What a safetensors header says of one tensor.

    Attributes:
        file: name of the file that holds it.
        dtype: as safetensors names it, such as BF16.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]


class HfFolder:
    """The tensors and config of one model folder. Only headers are kept; a tensor is mapped while it is used.

    Raises:
        ValueError: no folder, no config.json, no safetensors, a shard that is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise ValueError(f"{self.path} is not a folder with a Hugging Face model")
        self.config: HfConfig = read_json(self.path / "config.json")

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor of the folder by name, from the headers of all files."""
        index = self.path / INDEX_FILE
        if not index.is_file():
            if not (self.path / SINGLE_FILE).is_file():
                raise ValueError(
                    f"{self.path} holds neither {SINGLE_FILE} nor {INDEX_FILE}; other weight formats are not "
                    "read: save the model with save_pretrained(..., safe_serialization=True)"
                )
            return self._header(SINGLE_FILE)
        declared = read_json(index).get("weight_map")
        if not isinstance(declared, dict):
            raise ValueError(f"{index} has no weight_map")
        tensors: dict[str, StoredTensor] = {}
        for file in sorted(set(declared.values())):
            header = self._header(file)
            disputed = set(header) ^ {name for name, its_file in declared.items() if its_file == file}
            if disputed:
                raise ValueError(
                    f"{self.path / file} and {INDEX_FILE} disagree about: {', '.join(sorted(disputed))}"
                )
            tensors |= header
        return tensors

    def _header(self, file: str) -> dict[str, StoredTensor]:
        with self._open(file) as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
            return {
                name: StoredTensor(file, stored.get_dtype(), tuple(stored.get_shape()))
                for name, stored in slices.items()
            }

    def _open(self, name: str) -> Any:
        try:
            return safe_open(self.path / name, framework="pt", device="cpu")
        except FileNotFoundError:
            raise ValueError(f"{self.path / name} does not exist; {INDEX_FILE} names it") from None
        except SafetensorError as error:
            raise ValueError(f"{self.path / name} is damaged or incomplete: {error}") from None

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor. ValueError for one that is no float."""
        stored = self.tensors[name].dtype
        if stored not in DTYPE_OF_NAME:
            raise ValueError(
                f"{self.path}: {name} is stored as {stored}; only {', '.join(DTYPE_OF_NAME)} convert"
            )
        return DTYPE_OF_NAME[stored]

    def read(self, name: str) -> Tensor:
        """A tensor that lies in the file's mapping: its pages leave memory with it."""
        with self._open(self.tensors[name].file) as opened:
            return opened.get_tensor(name)
