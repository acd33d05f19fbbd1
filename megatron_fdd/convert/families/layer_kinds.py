"""What attention does in which layer: sliding windows, and layers whose queries and keys are not rotated."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from megatron_fdd.convert.families.family import HfConfig, MegatronArgs, refuse_field

_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, slots=True)
class AttentionWindows:
    """Sliding windows of attention.

    Attributes:
        size: number of tokens that a query sees, including its own; None if it sees all earlier tokens.
        slides: for each layer, whether it has the window.
    """

    size: int | None
    slides: tuple[bool, ...]

    def megatron_args(self) -> MegatronArgs:
        """Return argparse destinations and values. Megatron counts the tokens on the left of the query."""
        if self.size is None or not any(self.slides):
            return {"window_size": None, "window_attn_skip_freq": None}
        return {
            "window_size": (self.size - 1, 0),
            "window_attn_skip_freq": None if all(self.slides) else [int(slides) for slides in self.slides],
        }

    @classmethod
    def of_args(cls, args: Namespace) -> AttentionWindows:
        """Read the windows from Megatron's args. ValueError if windows look ahead."""
        if args.window_size is None:
            return cls(None, (False,) * args.num_layers)
        left, right = args.window_size
        if right != 0 or left < 0:
            raise ValueError(f"the checkpoint's window_size {args.window_size} is no causal window")
        rule = args.window_attn_skip_freq
        if rule is None:
            slides = [True] * args.num_layers
        elif isinstance(rule, int):  # one layer in every `rule` has no window
            slides = [(layer + 1) % rule != 0 for layer in range(args.num_layers)]
        else:
            slides = [bool(one) for one in rule]
        return cls(left + 1, tuple(slides))

    @property
    def effective(self) -> AttentionWindows:
        """The windows, without a size that no layer uses."""
        return self if any(self.slides) else AttentionWindows(None, self.slides)

    def keep_layers(self, layers: Sequence[int]) -> AttentionWindows:
        """Return the windows of these layers alone."""
        return AttentionWindows(self.size, tuple(self.slides[layer] for layer in layers)).effective


def read_windows(
    model_type: str, fields: Collection[str], config: Mapping[str, Any], layers: int
) -> AttentionWindows:
    """Read the windows from config.json.

    Args:
        fields: those that describe windows in this model type; none if it has no windows.
    """
    size = config.get("sliding_window")
    if not fields and size is not None:
        refuse_field("sliding_window", size, f"which a {model_type} does not have; remove the field")
    if "use_sliding_window" in fields and not config["use_sliding_window"]:
        size = None  # transformers writes 0 then for Qwen2-MoE
    if size == 0:
        refuse_field("sliding_window", size, "which must be at least 1, or null for layers without a window")
    slides = size is not None
    kinds = config.get("layer_types")
    if kinds is None and "max_window_layers" in fields:
        first = config["max_window_layers"]
        if slides and first is None:
            refuse_field("max_window_layers", first, "so that the first layer with a window is not known")
        return AttentionWindows(size, tuple(slides and layer >= first for layer in range(layers))).effective
    kinds = kinds or [_SLIDING if slides else _FULL] * layers
    allowed = {_FULL, _SLIDING} if slides and "layer_types" in fields else {_FULL}
    if slides and "layer_types" not in fields:
        allowed = {_SLIDING}
    if len(kinds) != layers or not set(kinds) <= allowed:
        only = " and ".join(f'"{kind}"' for kind in sorted(allowed))
        refuse_field("layer_types", kinds, f"where this config allows {layers} layers of {only}")
    return AttentionWindows(size, tuple(kind == _SLIDING for kind in kinds)).effective


def write_windows(
    fields: Collection[str], config: HfConfig, before: AttentionWindows, after: AttentionWindows
) -> None:
    """Set the fields of `config` that describe windows."""
    kinds = [_SLIDING if slides else _FULL for slides in after.slides]
    if before.size is None and after.size is None:
        if config.get("layer_types") is not None:
            config["layer_types"] = kinds
        return
    # Where each layer says its kind, transformers needs a size even if none has a window.
    if after.size is not None or not {"use_sliding_window", "layer_types"} & set(fields):
        config["sliding_window"] = after.size
    if "use_sliding_window" in fields:
        config["use_sliding_window"] = after.size is not None
    if "layer_types" in fields or config.get("layer_types") is not None:
        config["layer_types"] = kinds


def named_kinds(config: Mapping[str, Any], pattern: int, layers: int) -> list[str]:
    """Return `layer_types`, or without it what a pattern says: the last layer of each has no window.

    Args:
        pattern: the length where `sliding_window_pattern` does not say it.
    """
    kinds = config.get("layer_types")
    if kinds is not None:
        return list(kinds)
    length = config.get("sliding_window_pattern") or pattern
    if type(length) is not int:
        refuse_field("sliding_window_pattern", length, "which must be a whole number from 1 to 10,000")
    return [_SLIDING if (layer + 1) % length else _FULL for layer in range(layers)]


class Rotation(Enum):
    """How a model type says in which layers queries and keys are rotated."""

    ALL = "all"
    """They are in all layers."""
    LISTED = "no_rope_layers"
    """Where the list `no_rope_layers` has a 1 (sic); without one, in all but each `no_rope_layer_interval`-th layer."""
    SLIDING = "layer_types"
    """In the layers with a window; in all layers if none has one."""
    WINDOWED = "sliding_window"
    """In the layers with a window alone."""

    @property
    def fields(self) -> tuple[str, ...]:
        """The config.json fields that say it, beside those of windows."""
        return ("no_rope_layers", "no_rope_layer_interval") if self is Rotation.LISTED else ()

    def read(self, config: Mapping[str, Any], windows: AttentionWindows) -> tuple[bool, ...]:
        """Return for each layer whether it rotates."""
        layers = len(windows.slides)
        if self is Rotation.WINDOWED:
            return windows.slides
        if self is Rotation.SLIDING and config.get("sliding_window") is not None:
            return windows.slides
        if self is not Rotation.LISTED:
            return (True,) * layers
        listed = config.get("no_rope_layers")
        if listed is None:
            interval = config["no_rope_layer_interval"]
            return tuple((layer + 1) % interval != 0 for layer in range(layers))
        if len(listed) != layers:
            refuse_field("no_rope_layers", listed, f"which must have one entry for each of {layers} layers")
        return tuple(bool(one) for one in listed)


def rotation_args(rotates: Sequence[bool]) -> MegatronArgs:
    """Return argparse destinations and values. Megatron marks the layers that do not rotate."""
    return {"no_rope_freq": None if all(rotates) else [int(not one) for one in rotates]}


def rotation_of_args(args: Namespace) -> tuple[bool, ...]:
    """Read from Megatron's args for each layer whether it rotates."""
    rule = args.no_rope_freq
    if rule is None:
        return (True,) * args.num_layers
    if isinstance(rule, int):  # one layer in every `rule` does not rotate
        return tuple((layer + 1) % rule != 0 for layer in range(args.num_layers))
    return tuple(not one for one in rule)
