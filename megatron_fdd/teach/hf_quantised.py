"""Quantised weights of a folder: whether transformers reads them as such, and how they were multiplied."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers.quantizers.auto import AutoHfQuantizer

from megatron_fdd.convert.stored_tensor import DTYPE_OF_NAME, StoredTensor


def method_of(config: Any) -> str | None:
    """Return by which method a config.json says that its weights are quantised; None if it does not."""
    values = _values(config)
    return None if values is None else str(values.get("quant_method", "one without a name"))


def check_quantised(config: Any, folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse weights that transformers would take for plain numbers: it skips a method that it does not know.

    Args:
        config: of the model, by transformers.
        tensors: all of the folder's files.

    Raises:
        ValueError: names the method, or the first tensor.
    """
    values = _values(config)
    if values is not None and not _is_known(values):
        raise ValueError(
            f"--teacher {folder}: is quantised by {method_of(config)}, which transformers {version('transformers')} "
            "does not read: it would take the stored numbers for weights; give the model in bfloat16, or in another "
            "format"
        )
    if values is not None and values.get("load_in_8bit") and values.get("llm_int8_threshold", 6.0) > 0:
        raise ValueError(
            f"--teacher {folder}: is quantised by bitsandbytes' LLM.int8, which keeps those columns apart that have an "
            "entry above llm_int8_threshold anywhere in a batch: a token's states depend on other texts, and on what "
            "comes behind it, so that they cannot be stored by text; give the model in bfloat16, or in 4 bit"
        )
    packed = (name for name in sorted(tensors) if name.endswith("weight") and _is_packed(tensors[name]))
    if values is None and (name := next(packed, None)) is not None:
        raise ValueError(
            f"--teacher {folder}: {name} is stored as {tensors[name].dtype}, and config.json has no "
            "quantization_config with which transformers would scale it; give the model in bfloat16, or in another "
            "format"
        )


def how_it_ran(method: str | None, model: Any, dtype: str) -> str:
    """Return how a model's weights were multiplied: transformers dequantises by itself where a kernel is missing."""
    if method is None:
        return "no"
    is_quantised = getattr(model, "hf_quantizer", None) is not None
    return method if is_quantised else f"{method} -> dequantised to {dtype}"


def _values(config: Any) -> dict[str, Any] | None:
    found = getattr(config, "quantization_config", None)
    return found if found is None or isinstance(found, dict) else found.to_dict()


def _is_known(values: dict[str, Any]) -> bool:
    try:
        return bool(AutoHfQuantizer.supports_quant_method(values))
    except ValueError:  # no method is named
        return False


def _is_packed(tensor: StoredTensor) -> bool:
    """Whether a tensor's numbers are no weights by themselves."""
    return tensor.dtype not in DTYPE_OF_NAME
