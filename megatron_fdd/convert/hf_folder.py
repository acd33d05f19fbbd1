"""A Hugging Face model folder, read lazily: single or sharded safetensors, config and companion files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_fdd.convert.family import HfConfig

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILES = ("config.json", "generation_config.json")
# As safetensors names them.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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


class HfFolder:
    """The tensors and config of one model folder. Files stay open (memory-mapped) once read.

    Raises:
        ValueError: no folder, no config.json, no safetensors, a shard that is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise ValueError(f"{self.path} is not a folder with a Hugging Face model")
        self.config: HfConfig = read_json(self.path / "config.json")
        self._open: dict[str, Any] = {}

    @cached_property
    def file_of(self) -> dict[str, str]:
        """Tensor name -> file name."""
        index = self.path / INDEX_FILE
        if not index.is_file():
            if not (self.path / SINGLE_FILE).is_file():
                raise ValueError(
                    f"{self.path} holds neither {SINGLE_FILE} nor {INDEX_FILE}; other weight formats are not "
                    "read: save the model with save_pretrained(..., safe_serialization=True)"
                )
            return dict.fromkeys(self._file(SINGLE_FILE).keys(), SINGLE_FILE)
        declared = read_json(index).get("weight_map")
        if not isinstance(declared, dict):
            raise ValueError(f"{index} has no weight_map")
        for name in sorted(set(declared.values())):
            self._check_shard(name, {key for key, file in declared.items() if file == name})
        return declared

    def _check_shard(self, file: str, declared: set[str]) -> None:
        present = set(self._file(file).keys())
        if present != declared:
            raise ValueError(
                f"{self.path / file} and {INDEX_FILE} disagree about: {', '.join(sorted(present ^ declared))}"
            )

    def _file(self, name: str) -> Any:
        if name not in self._open:
            try:
                self._open[name] = safe_open(self.path / name, framework="pt", device="cpu")
            except FileNotFoundError:
                raise ValueError(f"{self.path / name} does not exist; {INDEX_FILE} names it") from None
            except SafetensorError as error:
                raise ValueError(f"{self.path / name} is damaged or incomplete: {error}") from None
        return self._open[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return tuple(self._file(self.file_of[name]).get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, from the header. ValueError for one that is no float."""
        stored = self._file(self.file_of[name]).get_slice(name).get_dtype()
        if stored not in _DTYPES:
            raise ValueError(f"{self.path}: {name} is stored as {stored}; only {', '.join(_DTYPES)} convert")
        return _DTYPES[stored]

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """A tensor, or the part [start, stop) of its dim 0 or 1; only that part is read from disk."""
        stored = self._file(self.file_of[name]).get_slice(name)
        if dim is None:
            return stored[:]
        assert dim in (0, 1), f"tensor parallelism cuts dim 0 or 1, not {dim}"
        return stored[start:stop] if dim == 0 else stored[:, start:stop]
