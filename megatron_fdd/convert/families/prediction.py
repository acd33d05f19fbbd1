"""Layers that predict further tokens (multi-token prediction), which DeepSeek and GLM store behind the last layer."""

from __future__ import annotations

from megatron_fdd.convert.families.family import HfConfig, LeftOut

# The second is transformers' own name.
PREDICTION_FIELDS = frozenset({"num_nextn_predict_layers", "num_mtp_layers"})


def _count(config: HfConfig) -> int:
    return max(config.get(field) or 0 for field in PREDICTION_FIELDS)


def _names(config: HfConfig) -> str:
    if "num_hidden_layers" not in config:
        raise ValueError('config.json lacks "num_hidden_layers", which says where such layers begin; add it')
    last = config["num_hidden_layers"]
    layers = "|".join(str(last + layer) for layer in range(_count(config)))
    return rf"model\.layers\.({layers})\..*" if layers else ""


def _without(config: HfConfig) -> HfConfig:
    return {field: 0 if field in PREDICTION_FIELDS else value for field, value in config.items()}


PREDICTION_LAYERS = LeftOut("multi-token prediction", _names, _without)
