"""Rotary positions in config.json, in the spelling before and since transformers 5, and in Megatron's args."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_fdd.convert.families.config_fields import check_rope_kinds
from megatron_fdd.convert.families.family import HfConfig, MegatronArgs, refuse_field

ROPE_FIELDS = {"rope_theta", "rope_scaling", "rope_parameters"}
# Megatron's RotaryEmbedding has these values built in; only the factor can be chosen.
_LLAMA3_CONSTANTS = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_MEGATRON_DEFAULT_FACTOR = 8.0


@dataclass(frozen=True, slots=True)
class Rope:
    """The base of the angles, and the factor of Llama-3 scaling (None if unscaled)."""

    theta: int
    llama3_factor: float | None

    def megatron_args(self) -> MegatronArgs:
        """Return argparse destinations and values."""
        factor = _MEGATRON_DEFAULT_FACTOR if self.llama3_factor is None else self.llama3_factor
        return {
            "rotary_base": self.theta,
            "use_rope_scaling": self.llama3_factor is not None,
            "rope_scaling_factor": factor,
        }


def read_rope(config: Mapping[str, Any]) -> Rope:
    """Read the positions from `rope_parameters` (transformers 5), or from `rope_theta` and `rope_scaling`.

    Raises:
        ValueError: Megatron's rotary embedding cannot do something; the message names it.
    """
    if config.get("rope_parameters") and config.get("rope_scaling"):
        refuse_field("rope_scaling", config["rope_scaling"], "and rope_parameters too: remove one of them")
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    check_rope_kinds(rope)
    theta = rope.pop("rope_theta", config.get("rope_theta", 10000.0))
    if theta != int(theta):
        refuse_field("rope_theta", theta, "Megatron's rotary base is a whole number")
    legacy_kind = rope.pop("type", "default")
    kind = rope.pop("rope_type", legacy_kind)
    partial = rope.pop("partial_rotary_factor", 1.0)
    if partial != 1.0:
        refuse_field("partial_rotary_factor", partial, "only 1.0 converts")
    if kind not in ("default", "llama3"):
        refuse_field("rope_type", kind, "only 'default' and 'llama3' convert")
    if kind == "default":
        _check_constants(kind, rope, {})
        return Rope(int(theta), None)
    factor = rope.pop("factor", None)
    if factor is None:
        refuse_field("rope_type", kind, "but no factor")
    _check_constants(kind, rope, _LLAMA3_CONSTANTS)
    return Rope(int(theta), float(factor))


def _check_constants(kind: str, rope: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse rope fields unless they have exactly the values that Megatron has built in."""
    for field, value in rope.items():
        if field not in expected:
            refuse_field(field, value, f"which rope type {kind!r} has no use for")
        if value != expected[field]:
            refuse_field(field, value, f"Megatron's Llama-3 rope scaling has {expected[field]} built in")
    absent = sorted(set(expected) - set(rope))
    if absent:
        refuse_field("rope_type", kind, f"but no {', '.join(absent)}")


def write_rope(config: HfConfig, rope: Rope) -> None:
    """Set the rope fields of `config`, in the spelling that it already uses."""
    scaling: dict[str, Any] = {"rope_type": "default"}
    if rope.llama3_factor is not None:
        scaling = {"rope_type": "llama3", "factor": rope.llama3_factor, **_LLAMA3_CONSTANTS}
    if "rope_theta" in config:
        config["rope_theta"] = float(rope.theta)
        config["rope_scaling"] = scaling if rope.llama3_factor is not None else None
        config.pop("rope_parameters", None)
    else:
        config["rope_parameters"] = {"rope_theta": float(rope.theta), **scaling}
        config.pop("rope_scaling", None)
