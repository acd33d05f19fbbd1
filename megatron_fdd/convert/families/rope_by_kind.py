"""Rotary positions that differ between layers with a sliding window and the others, in both spellings of config.json.

Before transformers 5 the layers with a window had `rope_local_base_freq`. Since then `rope_parameters` has an object
for each kind of layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_fdd.convert.families.config_fields import check_rope_kinds
from megatron_fdd.convert.families.family import HfConfig, refuse_field
from megatron_fdd.convert.families.layer_kinds import named_kinds

_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, slots=True)
class RopeByKind:
    """The two spellings of a model type.

    Attributes:
        defaults: of the config.json; with "rope_theta", "rope_local_base_freq" and "num_hidden_layers".
        pattern: how many layers a pattern has, the last one of them without a window.
    """

    defaults: Mapping[str, Any]
    pattern: int

    def flatten(self, config: HfConfig) -> HfConfig:
        """Spell the rotary bases as transformers did before version 5, and name the kind of every layer."""
        flat = dict(config)
        by_kind = config.get("rope_parameters")
        if by_kind:
            flat |= self._bases(by_kind)
        layers = config.get("num_hidden_layers", self.defaults["num_hidden_layers"])
        flat["layer_types"] = named_kinds(config, self.pattern, layers)
        return flat

    def _bases(self, by_kind: Mapping[str, Any]) -> HfConfig:
        if not set(by_kind) <= {_FULL, _SLIDING}:
            refuse_field("rope_parameters", by_kind, f'where only "{_FULL}" and "{_SLIDING}" convert')
        for kind in (_FULL, _SLIDING):
            if not isinstance(by_kind.get(kind) or {}, dict):
                refuse_field("rope_parameters", by_kind, f'where "{kind}" must be an object')
        sliding = dict(by_kind.get(_SLIDING) or {})
        check_rope_kinds(sliding)
        if sliding.pop("rope_type", "default") != "default" or set(sliding) > {"rope_theta"}:
            refuse_field("rope_parameters", by_kind, f'where "{_SLIDING}" may have a rope_theta alone')
        return {
            "rope_parameters": {"rope_theta": self.defaults["rope_theta"], **(by_kind.get(_FULL) or {})},
            "rope_local_base_freq": sliding.get("rope_theta", self.defaults["rope_local_base_freq"]),
        }

    def restore(self, flat: HfConfig) -> HfConfig:
        """Restore the spelling of transformers 5, if `flatten` found it."""
        if not flat.get("rope_parameters"):
            return flat
        config = {name: value for name, value in flat.items() if name != "rope_local_base_freq"}
        theta = flat.get("rope_local_base_freq", self.defaults["rope_local_base_freq"])
        config["rope_parameters"] = {
            _FULL: flat["rope_parameters"],
            _SLIDING: {"rope_type": "default", "rope_theta": theta},
        }
        return config
