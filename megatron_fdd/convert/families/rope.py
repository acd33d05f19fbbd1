"""Rotary positions in config.json, in the spelling before and since transformers 5, and in Megatron's args."""

from __future__ import annotations

import dataclasses
import math
from argparse import Namespace
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

from megatron_fdd.convert.families.config_fields import check_rope_kinds
from megatron_fdd.convert.families.family import HfConfig, MegatronArgs, refuse_field

ROPE_FIELDS = {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"}
_THETA = 10000.0
# How the names of Megatron's arguments differ from those of `Yarn`.
_YARN_ARGS = {
    "factor": "rotary_scaling_factor",
    "original": "yarn_original_max_position_embeddings",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "truncate": "yarn_correction_range_round_to_int",
}
# Megatron's defaults, which stand in the args of a model without scaling.
_UNSCALED: Mapping[str, Any] = {
    "position_embedding_type": "rope",
    "use_rope_scaling": False,
    "rope_scaling_factor": 8.0,
    "rotary_seq_len_interpolation_factor": None,
}
Config = Mapping[str, Any]


class Scaling(Protocol):
    """A way to turn the angles of positions beyond those of the first training."""

    kind: ClassVar[str]
    """The `rope_type` in a config.json."""

    @classmethod
    def read(cls, rope: dict[str, Any], config: Config) -> Self:
        """Take this scaling's fields out of `rope`; ValueError for what Megatron's rotary embedding cannot do."""

    @classmethod
    def of_args(cls, args: Namespace) -> Self | None:
        """Read the scaling from Megatron's args; None if they have another one, or none."""

    def megatron_args(self) -> MegatronArgs:
        """Return argparse destinations and values."""

    def fields(self) -> dict[str, Any]:
        """Return the fields of `rope_scaling` beside its type."""


def _pop_factor(kind: str, rope: dict[str, Any]) -> float:
    factor = rope.pop("factor", None)
    if factor is None:
        refuse_field("rope_type", kind, "but no factor")
    return float(factor)


@dataclass(frozen=True, slots=True)
class Linear:
    """Positions divided by a factor."""

    kind: ClassVar[str] = "linear"
    factor: float

    @classmethod
    def read(cls, rope: dict[str, Any], _config: Config) -> Linear:
        """See `Scaling`."""
        return cls(_pop_factor(cls.kind, rope))

    @classmethod
    def of_args(cls, args: Namespace) -> Linear | None:
        """See `Scaling`."""
        factor = args.rotary_seq_len_interpolation_factor
        return None if factor is None else cls(float(factor))

    def megatron_args(self) -> MegatronArgs:
        """See `Scaling`."""
        return {"rotary_seq_len_interpolation_factor": self.factor}

    def fields(self) -> dict[str, Any]:
        """See `Scaling`."""
        return {"factor": self.factor}


@dataclass(frozen=True, slots=True)
class Llama3:
    """The scaling of Llama 3.1 and later. Megatron has all but the factor built in."""

    kind: ClassVar[str] = "llama3"
    _CONSTANTS: ClassVar[Mapping[str, Any]] = {
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    factor: float

    @classmethod
    def read(cls, rope: dict[str, Any], _config: Config) -> Llama3:
        """See `Scaling`."""
        scaling = cls(_pop_factor(cls.kind, rope))
        absent = sorted(set(cls._CONSTANTS) - set(rope))
        if absent:
            refuse_field("rope_type", cls.kind, f"but no {', '.join(absent)}")
        for field, expected in cls._CONSTANTS.items():
            value = rope.pop(field)
            if value != expected:
                refuse_field(field, value, f"Megatron's Llama-3 rope scaling has {expected} built in")
        return scaling

    @classmethod
    def of_args(cls, args: Namespace) -> Llama3 | None:
        """See `Scaling`."""
        return cls(args.rope_scaling_factor) if args.use_rope_scaling else None

    def megatron_args(self) -> MegatronArgs:
        """See `Scaling`."""
        return {"use_rope_scaling": True, "rope_scaling_factor": self.factor}

    def fields(self) -> dict[str, Any]:
        """See `Scaling`."""
        return {"factor": self.factor, **self._CONSTANTS}


@dataclass(frozen=True, slots=True)
class Yarn:
    """YaRN (Peng et al., 2023): fast turning dimensions keep their angles, slow ones are divided by the factor.

    Attributes:
        factor: by how much the context grows.
        original: number of positions before.
        beta_fast, beta_slow: turns within `original` that bound the dimensions in between.
        mscale, mscale_all_dim: the cosines and sines are multiplied by m(mscale) / m(mscale_all_dim), where m(x) is
            0.1 x ln(factor) + 1.
        truncate: whether the bounds are whole dimensions.
    """

    kind: ClassVar[str] = "yarn"
    factor: float
    original: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    truncate: bool = True

    @classmethod
    def read(cls, rope: dict[str, Any], config: Config) -> Yarn:
        """See `Scaling`. What is absent, or null, is what transformers takes."""
        original = rope.pop("original_max_position_embeddings", None) or config.get("max_position_embeddings")
        if original is None:
            refuse_field("rope_type", cls.kind, "but no original_max_position_embeddings")
        factor = rope.pop("factor", None) or config["max_position_embeddings"] / original
        both = rope.pop("mscale", None), rope.pop("mscale_all_dim", None)
        mscale, all_dim = both if all(both) else (1.0, 0.0)
        scaling = cls(
            factor=float(factor),
            original=original,
            beta_fast=float(rope.pop("beta_fast", None) or 32),
            beta_slow=float(rope.pop("beta_slow", None) or 1),
            mscale=float(mscale),
            mscale_all_dim=float(all_dim),
            truncate=rope.pop("truncate", True),
        )
        given = rope.pop("attention_factor", None)
        if given is not None and not math.isclose(given, scaling.attention_factor, rel_tol=1e-7):
            refuse_field(
                "attention_factor",
                given,
                f"and Megatron computes it from factor and mscale: {scaling.attention_factor}",
            )
        return scaling

    @property
    def attention_factor(self) -> float:
        """What the cosines and sines are multiplied by."""
        return self._m(self.mscale) / self._m(self.mscale_all_dim)

    def _m(self, scale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * scale * math.log(self.factor) + 1.0

    @classmethod
    def of_args(cls, args: Namespace) -> Yarn | None:
        """See `Scaling`. An argument that is None has Megatron's default, which is that of this class."""
        if args.position_embedding_type != "yarn":
            return None
        defaults = {"factor": 1.0, "original": 4096}
        given = {field: getattr(args, name) for field, name in _YARN_ARGS.items()}
        return cls(**defaults | {field: value for field, value in given.items() if value is not None})

    def megatron_args(self) -> MegatronArgs:
        """See `Scaling`."""
        named = {name: getattr(self, field) for field, name in _YARN_ARGS.items()}
        return {"position_embedding_type": "yarn", **named}

    def fields(self) -> dict[str, Any]:
        """See `Scaling`."""
        fields = dataclasses.asdict(self)
        fields["original_max_position_embeddings"] = fields.pop("original")
        if self.mscale_all_dim == 0.0:  # what transformers takes where neither is given
            if self.mscale != 1.0:
                raise ValueError(
                    f"a config.json cannot say mscale {self.mscale} without mscale_all_dim: give both, or --mscale 1"
                )
            del fields["mscale"], fields["mscale_all_dim"]
        return fields


_SCALINGS: dict[str, type[Scaling]] = {scaling.kind: scaling for scaling in (Linear, Llama3, Yarn)}


@dataclass(frozen=True, slots=True)
class Rope:
    """The base of the angles, their scaling (None without one), and the part of a head's dimensions that turns."""

    theta: float
    scaling: Scaling | None = None
    partial: float = 1.0

    def megatron_args(self) -> MegatronArgs:
        """Return argparse destinations and values."""
        scaled = {} if self.scaling is None else self.scaling.megatron_args()
        return {**_UNSCALED, "rotary_base": self.theta, "rotary_percent": self.partial, **scaled}

    @classmethod
    def of_args(cls, args: Namespace) -> Rope:
        """Read the positions from Megatron's args."""
        found = (scaling.of_args(args) for scaling in _SCALINGS.values())
        scaling = next((each for each in found if each is not None), None)
        return cls(args.rotary_base, scaling, args.rotary_percent)


ROPE_KINDS = ("default", *_SCALINGS)


def read_rope(config: Config, partial: float | None = None, kinds: Collection[str] = ROPE_KINDS) -> Rope:
    """Read the positions from `rope_parameters` (transformers 5), or from `rope_theta` and `rope_scaling`.

    Args:
        partial: the part of a head that turns where the config does not say it; None if the model type turns all of it
            always.
        kinds: those that the model type can have.

    Raises:
        ValueError: Megatron's rotary embedding cannot do something; the message names it.
    """
    if config.get("rope_parameters") and config.get("rope_scaling"):
        refuse_field("rope_scaling", config["rope_scaling"], "and rope_parameters too: remove one of them")
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    check_rope_kinds(rope)
    theta = rope.pop("rope_theta", config.get("rope_theta", _THETA))
    legacy_kind = rope.pop("type", "default")
    kind = rope.pop("rope_type", legacy_kind)
    turned = rope.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor")
    if partial is None and turned not in (None, 1.0):
        refuse_field("partial_rotary_factor", turned, "only 1.0 converts")
    if kind not in kinds:
        refuse_field("rope_type", kind, f"only {', '.join(map(repr, kinds))} convert")
    scaling = _read_scaling(kind, rope, config)
    found = Rope(int(theta) if theta == int(theta) else theta, scaling, float(turned or partial or 1.0))
    if isinstance(scaling, Yarn) and found.partial != 1.0:
        refuse_field("partial_rotary_factor", found.partial, "and Megatron's YaRN turns all of a head")
    return found


def _read_scaling(kind: str, rope: dict[str, Any], config: Config) -> Scaling | None:
    scaling = None if kind == "default" else _SCALINGS[kind].read(rope, config)
    for field, value in rope.items():
        refuse_field(field, value, f"which rope type {kind!r} has no use for")
    return scaling


def write_rope(config: HfConfig, rope: Rope) -> None:
    """Set the rope fields of `config`, in the spelling that it already uses."""
    scaling: dict[str, Any] = {"rope_type": "default"}
    if rope.scaling is not None:
        scaling = {"rope_type": rope.scaling.kind, **rope.scaling.fields()}
    if "rope_theta" in config:
        config["rope_theta"] = float(rope.theta)
        config["rope_scaling"] = scaling if rope.scaling is not None else None
        config.pop("rope_parameters", None)
        partial_in = config
    else:
        config["rope_parameters"] = {"rope_theta": float(rope.theta), **scaling}
        config.pop("rope_scaling", None)
        partial_in = config if "partial_rotary_factor" in config else config["rope_parameters"]
    if rope.partial != 1.0 or "partial_rotary_factor" in config:
        partial_in["partial_rotary_factor"] = rope.partial
