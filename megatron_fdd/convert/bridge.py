"""Megatron-Bridge, for model types without our own table; checks find what it misread or left out."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import math
import re
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from torch import Tensor

from megatron_fdd.convert.bridge_config import architecture_of, check_same, check_trained
from megatron_fdd.convert.checkpoint_entries import tensors_of
from megatron_fdd.convert.families import FAMILIES
from megatron_fdd.convert.families.family import HfConfig
from megatron_fdd.convert.mcore_model import build_model
from megatron_fdd.host.field_kinds import shown
from megatron_fdd.host.json_file import read_json
from megatron_fdd.host.listing import listing


def _alternate(layer_types: list[str]) -> bool:
    wanted = ("sliding_attention", "full_attention")
    return all(kind == wanted[layer % 2] for layer, kind in enumerate(layer_types))


_VERSION = "0.6.2"
_Allowed = tuple[Any, ...] | Callable[[Any], bool]
# The model types whose logits were compared with those of transformers, and the fields of their config.json whose
# values this version assumes without reading them. (The latent norms of DeepSeek have their own epsilon in
# transformers; Megatron has one epsilon for all norms.)
CHECKED: Mapping[str, Mapping[str, _Allowed]] = {
    "deepseek_v3": {"rms_norm_eps": (1e-6,), "norm_topk_prob": (True,), "rope_interleave": (True,)},
    "glm4_moe": {"norm_topk_prob": (True,)},
    "gpt_oss": {
        "hidden_act": ("silu",),
        "layer_types": _alternate,
        "rope_parameters.rope_type": ("yarn",),
        "rope_parameters.factor": (32.0,),
        "rope_parameters.original_max_position_embeddings": (4096,),
        "rope_parameters.beta_fast": (32.0,),
        "rope_parameters.beta_slow": (1.0,),
        "rope_parameters.truncate": (False,),
    },
    "nemotron": {"hidden_act": ("relu2",), "rope_parameters.rope_type": ("default",)},
}
# Buffers that carry no information.
_IGNORED = ("rotary_emb.inv_freq",)
_PREDICTION_LAYERS = "num_nextn_predict_layers"


class Bridge:
    """Megatron-Bridge, set up for one model by its config.json.

    Attributes:
        config: the config of the converted model, without multi-token prediction, which no distillation builds.
        values: Megatron's arguments for the model.

    Raises:
        ValueError: Megatron-Bridge is not installed; the model type has our own table or was not checked;
            Megatron-Bridge would read the value of a config field as another value.
    """

    def __init__(self, config_path: Path) -> None:
        self.config = read_json(config_path)
        self._model_type = _checked_type(self.config)
        auto_bridge = _auto_bridge()
        from transformers import AutoConfig

        with self._told():
            settings = AutoConfig.from_pretrained(str(config_path), trust_remote_code=False)
        _check_settings(settings.to_dict(), self._model_type)
        if self.config.get(_PREDICTION_LAYERS):
            self.config = {**self.config, _PREDICTION_LAYERS: 0}
            setattr(settings, _PREDICTION_LAYERS, 0)
        with self._told():
            self._bridge = auto_bridge.from_hf_config(settings)
            self._provider = self._bridge.to_megatron_provider(load_weights=False)
        self.values = architecture_of(self._provider)

    def check_trained(self, args: Namespace) -> None:
        """Refuse a checkpoint unless its args describe the model of the config."""
        check_trained(self._provider, self.values, args, self._model_type)

    def build(self, args: Namespace, groups: Any) -> torch.nn.Module:
        """Build a GPTModel on the CPU; its vocabulary is not padded, and its values are NaN.

        Args:
            args: the complete args, made from `values`.

        Raises:
            ValueError: a training run builds from `args` another model than Megatron-Bridge describes.
        """
        check_same(self._provider, args, self._model_type)
        model = build_model(Namespace(**{**vars(args), "padded_vocab_size": args.vocab_size}), groups)
        for tensor in tensors_of(model).values():
            tensor.detach().fill_(math.nan)
        return model

    def load(self, model: torch.nn.Module, hf_model: Path) -> None:
        """Fill the model from a Hugging Face folder. ValueError: something was left out."""
        with self._told():
            self._bridge.load_hf_weights([model], hf_path=str(hf_model))
        unset = [name for name, tensor in tensors_of(model).items() if tensor.isnan().any()]
        if unset:
            raise ValueError(
                f"{hf_model}: Megatron-Bridge finds nothing for, or NaN in: {listing(unset)}; is the folder complete?"
            )

    def export(self, model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Yield the Hugging Face names and tensors of the model, one at a time."""
        with self._told():
            tensors = iter(self._bridge.export_hf_weights([model], cpu=True, show_progress=False))
        while True:
            with self._told():
                found = next(tensors, None)
            if found is None:
                return
            yield found[0], found[1].detach().contiguous()

    def converts(self, name: str) -> bool:
        """Whether a tensor of a Hugging Face folder belongs in the model."""
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        predicts = layer is not None and int(layer[1]) >= self.config["num_hidden_layers"]
        return not predicts and not name.endswith(_IGNORED)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Turn any error inside into one line, and drop what Megatron-Bridge prints."""
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                yield
        except Exception as error:
            raise ValueError(
                f"Megatron-Bridge cannot convert this {self._model_type}: {type(error).__name__}: {_first_line(error)}"
            ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")


def _auto_bridge() -> Any:
    """Return the class AutoBridge of Megatron-Bridge.

    Raises:
        ValueError: it cannot be imported, its version is not the checked one, or it requires another transformers.
    """
    package = f"megatron-bridge=={_VERSION}"
    try:
        from megatron.bridge import AutoBridge
    except Exception as error:  # TransformerEngine without a CUDA library raises OSError, and more
        raise ValueError(
            f"--via bridge: Megatron-Bridge cannot be imported ({_first_line(error)}). It needs a GPU and "
            f"TransformerEngine: pip install {package} 'transformer-engine[pytorch]'"
        ) from error
    version = importlib.metadata.version("megatron-bridge")
    if version != _VERSION:
        raise ValueError(
            f"--via bridge was checked with Megatron-Bridge {_VERSION}; {version} is here: pip install {package}"
        )
    found = importlib.metadata.version("transformers")
    for line in importlib.metadata.requires("megatron-bridge") or ():
        wanted = Requirement(line)
        # Version 0.6.2 with transformers 5.23 found no rotary fraction in the configs of GLM-4.5 and Nemotron, and
        # went on with 1.
        if wanted.name == "transformers" and not wanted.specifier.contains(found):
            raise ValueError(
                f"--via bridge: Megatron-Bridge {_VERSION} asks for transformers{wanted.specifier} and misreads "
                f"configs with {found}: pip install 'transformers{wanted.specifier}'"
            )
    return AutoBridge


def _checked_type(config: HfConfig) -> str:
    found = config.get("model_type")
    model_type = found if isinstance(found, str) else ""
    if model_type in FAMILIES:
        raise ValueError(f"{model_type} needs no Megatron-Bridge: leave out --via bridge")
    if model_type not in CHECKED:
        raise ValueError(
            f'config.json says "model_type": {shown(found)}; --via bridge converts {", ".join(sorted(CHECKED))}: '
            "model types that a GPTModel can express and whose logits were compared with transformers'"
        )
    return model_type


def _check_settings(settings: HfConfig, model_type: str) -> None:
    """Refuse a field with a value that Megatron-Bridge does not read."""
    for path, allowed in CHECKED[model_type].items():
        value: Any = settings
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        right = value is None or (value in allowed if isinstance(allowed, tuple) else allowed(value))
        if not right:
            raise ValueError(
                f'config.json has "{path}": {value!r}, which Megatron-Bridge does not read: it would make another '
                f"{model_type} of it"
            )
