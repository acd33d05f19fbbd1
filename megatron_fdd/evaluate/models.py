"""Hugging Face folders in an evaluation: where a model runs, in which precision, and which tokens end its answers."""

from __future__ import annotations

import hashlib
import math
import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from megatron_fdd.data.tokenizer_identity import TokenizerIdentity, has_tokenizer, without_second_start
from megatron_fdd.evaluate.model_files import check_no_kernels, check_sizes, check_weight_files
from megatron_fdd.evaluate.tokenizer import load_tokenizer
from megatron_fdd.host.field_kinds import shown
from megatron_fdd.host.json_file import read_json
from megatron_fdd.host.model_fields import POSITIONS, VOCABULARY


@dataclass(frozen=True, slots=True)
class Placement:
    """The device of the models, and the dtype of their weights."""

    device: str
    dtype: str

    @classmethod
    def choose(cls, device: str | None, dtype: str | None) -> Placement:
        """Return the requested placement; by default a GPU in bfloat16 where there is one, else the CPU in float32.

        Raises:
            ValueError: a GPU was requested and there is none.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no GPU here; leave the flag out")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(device, dtype or ("bfloat16" if device == "cuda" else "float32"))

    def load(self, folder: Path) -> PreTrainedModel:
        """Load a model, ready to run; it is spread over all visible GPUs if there are several.

        Raises:
            ValueError: the files are damaged, or are not those of the model that the config describes.
        """
        check_weight_files(folder)
        several = self.device == "cuda" and torch.cuda.device_count() > 1
        device_map = "auto" if several else self.device
        try:
            with warnings.catch_warnings():
                # It asks to write to torch's authors.
                warnings.filterwarnings("ignore", "Detected pickle protocol")
                loaded: Any = _class_of(folder).from_pretrained(
                    folder,
                    dtype=self.dtype,
                    device_map=device_map,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,
                    trust_remote_code=False,
                )
        except torch.OutOfMemoryError:
            raise
        except pickle.UnpicklingError as error:  # torch's words tell how to run what is in the file
            raise ValueError(
                f"{folder}: its .bin file is damaged or holds more than tensors, and reading it could run code; "
                "give the model as safetensors"
            ) from error
        except Exception as error:  # a config with a wrong number: transformers raises anything
            raise ValueError(
                f"{folder} does not load as a model ({_first_line(error)}); get it again"
            ) from error
        model: PreTrainedModel = loaded[0]
        info: dict[str, Any] = loaded[1]
        # Transformers fills both with random numbers, with a warning.
        wrong = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
        if wrong:
            raise ValueError(
                f"{folder} lacks {len(wrong)} of the tensors that its config.json asks for, or has them in another "
                f"shape ({wrong[0]}): copy or export the model again"
            )
        return model.eval()


def _class_of(folder: Path) -> Any:
    """Return transformers' class for a model: some that see images too have none for text alone."""
    config = type(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    has_none = config not in AutoModelForCausalLM._model_mapping
    return (
        AutoModelForImageTextToText
        if has_none and config in AutoModelForImageTextToText._model_mapping
        else AutoModelForCausalLM
    )


@dataclass(frozen=True, slots=True)
class NamedModel:
    """A model folder as given, and the name of its results."""

    name: str
    folder: Path

    def check(self) -> None:
        """Refuse a folder without a known model; transformers would look for it online.

        Raises:
            ValueError: the folder has no model, or one of an unknown kind; or the name cannot be that of a folder.
        """
        if not (self.folder / "config.json").is_file():
            raise ValueError(
                f"{self.folder} is not a Hugging Face model folder: it has no config.json; give another"
            )
        if not self.name or self.name in (".", "..") or "/" in self.name:
            raise ValueError(
                f"{self.name!r} cannot be the name of a folder for results; give one as NAME={self.folder}"
            )
        self.config()

    def config(self) -> PreTrainedConfig:
        """Return the configuration of the language model.

        Raises:
            ValueError: transformers does not know the model, or a size of it has no meaning.
        """
        content = read_json(self.folder / "config.json")
        check_no_kernels(content, self.folder)
        check_sizes(content, self.folder)  # before a class computes something from each of 100 million layers
        try:
            config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False).get_text_config()
        except Exception as error:  # classes check their fields in their own ways, or not at all
            kind = content.get("model_type")
            if isinstance(kind, str) and kind not in CONFIG_MAPPING:
                raise ValueError(
                    f"{self.folder}/config.json: transformers has no model type {shown(kind)}, and code of a folder "
                    "is not run; give a model of a type that it has"
                ) from error
            raise ValueError(
                f"{self.folder}/config.json cannot be read ({_first_line(error)}); get it again"
            ) from error
        if not VOCABULARY.fits(getattr(config, "vocab_size", None)):
            raise ValueError(f"{self.folder}/config.json has no vocab_size, which must be {VOCABULARY.words}")
        return config

    def check_ids(self, largest: int) -> None:
        """Refuse token ids for which the model has no embedding.

        Args:
            largest: the largest id that it would get.

        Raises:
            ValueError: names the id and the number of embeddings.
        """
        size = self.config().vocab_size
        if largest >= size:
            raise ValueError(
                f"{self.folder}: the tokenizer gives the id {largest}, and the model has {size} embeddings "
                "(vocab_size in config.json); copy the files of its own tokenizer into the folder"
            )

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the folder's own tokenizer, which gives the ids of its tokenizer.json whatever class it names.

        Raises:
            ValueError: the folder has no such tokenizer.
        """
        return load_tokenizer(self.folder, self.fingerprint())[0]

    def identity(self) -> TokenizerIdentity | None:
        """Return the identity of the tokenizer; None if the folder has no tokenizer files.

        Raises:
            ValueError: as in `tokenizer`.
        """
        return load_tokenizer(self.folder, self.fingerprint())[1] if has_tokenizer(self.folder) else None

    def fingerprint(self) -> str:
        """Return a hash of the names, sizes and times of the folder's files, which changes when a file does.

        Hashing the weights would take minutes.
        """
        digest = hashlib.sha256()
        for path in sorted(self.folder.iterdir()):
            if path.is_file():
                status = path.stat()
                digest.update(f"{path.name}\t{status.st_size}\t{status.st_mtime_ns}\n".encode())
        return digest.hexdigest()


def num_positions(config: PreTrainedConfig) -> int | float:
    """Return the longest input that a model takes; infinite if its config sets no limit. ValueError for no number."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return math.inf
    if not POSITIONS.fits(positions):
        raise ValueError(
            f"{config.name_or_path}/config.json has max_position_embeddings: {shown(positions)}, which must be "
            f"{POSITIONS.words}; get the file again"
        )
    return int(positions)


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that training puts before a text.

    They are the beginning-of-sequence token if the tokenizer puts one, else nothing.
    """
    first: list[int] = tokenizer("a")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def begun(ids: list[int], leading: list[int]) -> list[int]:
    """Return the ids of a text after the `leading_ids`.

    A text that begins with the literal start token gets no second one.
    """
    return without_second_start([*leading, *ids], leading[0] if leading else None)


def check_finite(model: PreTrainedModel, is_finite: bool) -> None:
    """Refuse a model whose predictions are not numbers, which would be scored as if it had answered.

    Raises:
        ValueError: names the model's folder.
    """
    if not is_finite:
        raise ValueError(
            f"{model.name_or_path} predicts NaN: it diverged in training, its files are damaged, "
            "or its values overflow in this --dtype"
        )


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return every id that ends an answer: those of the generation config, and the tokenizer's, which training used.

    Raises:
        ValueError: there is no such id, so no answer would ever end.
    """
    configured = model.generation_config.eos_token_id if model.generation_config else None
    ids = configured if isinstance(configured, list) else [configured]
    found = sorted({int(index) for index in [*ids, tokenizer.eos_token_id] if index is not None})
    if not found:
        raise ValueError(
            "neither generation_config.json nor the tokenizer names an end-of-sequence token; add one"
        )
    return found


def plain_generation(ends: list[int], max_new_tokens: int) -> GenerationConfig:
    """Return a greedy generation config, without the penalties, top-k and temperature of a published one."""
    return GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=ends[0]
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = " ".join(
        lines[: 1 + (bool(lines) and lines[0].endswith(":"))]
    )  # "Validation error for field ...:"
    return line if line and isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {line}"
