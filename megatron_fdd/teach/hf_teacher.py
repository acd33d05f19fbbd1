"""A teacher in a Hugging Face folder: loaded without code from the folder and without a network, and its identity."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import xxhash
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_fdd.convert.hf_folder import HfFolder
from megatron_fdd.convert.stored_tensor import DTYPE_OF_NAME, StoredTensor
from megatron_fdd.data.store.identity import StoreIdentity, TapForm
from megatron_fdd.evaluate.models import NamedModel
from megatron_fdd.step.teacher.tap_format import TapFormat
from megatron_fdd.teach.hf_parts import Parts
from megatron_fdd.teach.hf_quantised import check_quantised, how_it_ran, method_of

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# The forms that keep a hidden state as it is.
FORM_OF: dict[str, TapForm] = {"float32": "float32", "bfloat16": "bf16"}
_FLAG = "--teacher"
# What a config.json says that changes no hidden state.
_IRRELEVANT = (
    *(
        "_name_or_path",
        "architectures",
        "auto_map",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    ),
    *(
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
    ),
)
# Fields of a store's identity that only a loaded model tells.
UNKNOWN = frozenset(("weights", "final_norm", "hidden_size", "vocab_size", "token_bytes", "ran"))
# The files are read a second time to be hashed, mostly from memory: loading has just read them.
_HASHING_THREADS, _HASHED_AT_ONCE = 8, 1 << 24


@dataclass(frozen=True)
class HfTeacher:
    """A folder with a causal language model, checked before anything of it is loaded.

    Attributes:
        dtype: of the weights and of the hidden states: "bfloat16" or "float32".
        device_map: where its parts go, as `from_pretrained` takes it.
    """

    folder: Path
    dtype: str
    device_map: str | Mapping[str, str | int]

    def check(self, form: TapForm) -> None:
        """Refuse a folder that does not run in transformers, or whose states would depend on their batch.

        Raises:
            ValueError: names the file or the field, and the remedy.
        """
        self.check_files(form)
        check_quantised(self.config, self.folder, self._files.tensors)
        method = method_of(self.config)
        if method is not None and self.dtype == "float32":
            raise ValueError(
                f"--dtype float32: {_FLAG} {self.folder} is quantised ({method}), and transformers leaves the "
                "rest of it in its own precision; use bfloat16"
            )
        if "dynamic" in dict(_ropes(self.config.to_dict())):
            raise ValueError(
                f"{_FLAG} {self.folder}: its rotary embedding is of the type dynamic, so that hidden states depend on "
                "the longest row that ran before; set another rope_type in its config.json, for example linear or yarn"
            )

    def check_files(self, form: TapForm) -> None:
        """Refuse a folder without a model of a known type in whole files, and a form that does not suit it.

        Raises:
            ValueError: names the file or the field, and the remedy.
        """
        NamedModel(self.folder.resolve().name, self.folder).check()
        try:
            _ = self._files.tensors
        except ValueError as error:
            raise ValueError(f"{_FLAG}: {error}") from error
        if (self.folder / "adapter_config.json").exists():
            raise ValueError(
                f"{_FLAG} {self.folder}: has an adapter (adapter_config.json), which may name another base model; "
                "save the model with it merged, and give that"
            )
        own = FORM_OF[self.dtype]
        if form in FORM_OF.values() and form != own:
            raise ValueError(
                f"--form {form}: the teacher computes in {self.dtype}, and its features are stored so, or packed; use "
                f"--form {own}, int8 or fp8, or give another --dtype"
            )

    @cached_property
    def config(self) -> Any:
        """The configuration of the model. ValueError if transformers has no causal language model for it."""
        try:
            found = AutoConfig.from_pretrained(self.folder, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # classes check their fields in their own ways
            raise ValueError(f"{_FLAG} {self.folder}: {_reason(error)}") from error
        if type(found) not in AutoModelForCausalLM._model_mapping:
            raise ValueError(
                f"{_FLAG} {self.folder}: transformers {version('transformers')} has no causal language model of the "
                f"type {found.model_type}, and code beside a model is never run; convert it, or choose another teacher"
            )
        check_alone(found, f"{_FLAG} {self.folder}")
        return found

    @property
    def num_layers(self) -> int:
        """Layers of its language model."""
        return int(self.config.get_text_config(decoder=True).num_hidden_layers)

    @property
    def row_limits(self) -> tuple[int, ...]:
        """Lengths of a row beyond which every position of it is rotated otherwise (longrope), increasing."""
        found = {limit for kind, limit in _ropes(self.config.to_dict()) if kind == "longrope" and limit}
        return tuple(sorted(found))

    def load(self, offload: Path) -> Any:
        """Load the model, ready to run.

        Args:
            offload: a folder for weights that the device map keeps on disk.

        Raises:
            ValueError: the files are damaged, or are not those of the model that config.json describes.
        """
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                self.folder,
                config=self.config,
                dtype=self.dtype,
                device_map=self.device_map,
                offload_folder=offload,
                attn_implementation=None,  # a config.json may name a kernel of the hub
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a quantisation without its package, a device that is not there
            other = "install what it needs" if isinstance(error, ImportError) else "copy the model again"
            raise ValueError(
                f"{_FLAG} {self.folder} does not load ({_reason(error)}): {other}, or give another --device-map"
            ) from error
        model, info = loaded
        missing = sorted(info["missing_keys"])
        if missing:  # transformers fills them with random numbers, with a warning
            raise ValueError(
                f"{_FLAG} {self.folder} lacks {len(missing)} of the tensors that its config.json asks for "
                f"({missing[0]}): copy the model again"
            )
        for config in (model.config, model.config.get_text_config(decoder=True)):
            config.use_cache = False
        return model.eval().requires_grad_(False)

    def outline(self, blocks: Sequence[int], form: TapForm) -> StoreIdentity:
        """Return what a store of this teacher's features holds, but for `UNKNOWN`.

        Raises:
            ValueError: a hidden state cannot be packed in this form.
        """
        text = self.config.get_text_config(decoder=True)
        width = getattr(text, "hidden_size", None)
        if not isinstance(width, int):
            raise ValueError(
                f"{_FLAG} {self.folder}: its config.json has no hidden_size; choose another teacher"
            )
        return StoreIdentity(
            engine="transformers",
            teacher=str(self.folder),
            weights="",
            final_norm="",
            architecture=self._architecture_digest(),
            num_layers=self.num_layers,
            hidden_size=width,
            vocab_size=text.vocab_size,
            blocks=list(blocks),
            form=form,
            token_bytes=self._token_bytes(form, width),
            ran={"dtype": self.dtype},
        )

    def identity(self, model: Any, parts: Parts, outline: StoreIdentity) -> StoreIdentity:
        """Return what a store of this teacher's features holds.

        Raises:
            ValueError: a hidden state cannot be packed in this form.
        """
        width = parts.head.in_features
        return replace(
            outline,
            weights=self._weights_digest(),
            final_norm=self.final_norm_digest(parts),
            hidden_size=width,
            vocab_size=parts.head.out_features,
            token_bytes=self._token_bytes(outline.form, width),
            ran={
                "dtype": self.dtype,
                "attention": str(model.config.get_text_config(decoder=True)._attn_implementation),
                "quantisation": how_it_ran(method_of(self.config), model, self.dtype),
                "transformers": version("transformers"),
            },
        )

    def final_norm_digest(self, parts: Parts) -> str:
        """Return the hash of the final norm's weight, from the file where that has it, whatever --dtype is."""
        stored = self._files.tensors.get(parts.weight_name)
        is_plain = stored is not None and stored.dtype in DTYPE_OF_NAME
        weight_T = self._files.raw(parts.weight_name).float() if is_plain else parts.raw_weight_T
        return hashlib.sha256(weight_T.contiguous().numpy().tobytes()).hexdigest()

    def _token_bytes(self, form: TapForm, width: int) -> int:
        packing = TapFormat(DTYPES[self.dtype], form)
        packing.check_width(width, f"--form {form}")
        return packing.token_bytes(width)

    @cached_property
    def _files(self) -> HfFolder:
        return HfFolder(self.folder)

    def _weights_digest(self) -> str:
        """Return a hash of each tensor's name, dtype, shape and bytes, whatever file it is in."""
        total, tensors = hashlib.sha256(), sorted(self._files.tensors.items())
        with ThreadPoolExecutor(_HASHING_THREADS) as threads:
            sums = threads.map(self._sum, (tensor for _, tensor in tensors))
            for (name, tensor), found in zip(tensors, sums, strict=True):
                total.update(f"{name}\t{tensor.dtype}\t{tensor.shape}\t{found}\n".encode())
        return total.hexdigest()

    def _sum(self, tensor: StoredTensor) -> str:
        digest, left = xxhash.xxh3_128(), tensor.num_bytes
        with (self.folder / tensor.file).open("rb") as file:
            file.seek(tensor.offset)
            while part := file.read(min(_HASHED_AT_ONCE, left)):
                digest.update(part)
                left -= len(part)
        return digest.hexdigest()

    def _architecture_digest(self) -> str:
        """Return a hash of config.json without what changes no hidden state."""
        values = {name: value for name, value in self._files.stored_config.items() if name not in _IRRELEVANT}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def check_alone(config: Any, what: str) -> None:
    """Refuse the config of an encoder and a decoder: without what its encoder reads, a decoder predicts nothing.

    Args:
        what: the folder, for the message.

    Raises:
        ValueError: says so.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{what}: {config.model_type} has an encoder, and its decoder predicts nothing without it "
            "(is_encoder_decoder in config.json); choose another teacher (docs/teacher-types.md)"
        )


def _ropes(values: Any) -> Iterator[tuple[str, int | None]]:
    """Yield the types of rotary embeddings in a config, at any depth, each with its original length."""
    if not isinstance(values, dict):
        return
    kind = values.get("rope_type")
    if isinstance(kind, str):
        limit = values.get("original_max_position_embeddings")
        yield kind, limit if isinstance(limit, int) else None
    for value in values.values():
        yield from _ropes(value)


def _reason(error: Exception) -> str:
    """Return the first line of what transformers says."""
    line = next(iter(str(error).splitlines()), "")
    return line if line and isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {line}"
