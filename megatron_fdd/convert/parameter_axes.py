"""The axes of Megatron's parameters, by which a student's are cut out of a teacher's."""

from __future__ import annotations

import re
from enum import Enum


class Axis(Enum):
    """What the entries along one dim of a parameter belong to."""

    WHOLE = "whole"
    """Nothing that is cut: vocabulary, positions, latents."""
    HIDDEN = "hidden"
    QKV = "qkv"
    """Query, key and value rows, interleaved per query group."""
    HEADS = "heads"
    """The outputs of all heads, one head after the other."""
    EACH_HEAD = "each head"
    """One entry for each head."""
    ONE_HEAD = "one head"
    """The width of a head; in some layers that of all heads."""
    LATENT_HEADS = "latent heads"
    """Heads without query groups, which are made from a latent."""
    FFN = "ffn"
    GATED_FFN = "gated ffn"
    """All of gate, then all of up; in an MLP without a gate the same as `FFN`."""
    EXPERTS = "experts"


# A parameter's name, without "weight" or "bias", ends so. The axes are the weight's; a bias has the first one.
_AXES: dict[str, tuple[Axis, ...]] = {
    r"embedding\.(word|position)_embeddings|output_layer": (Axis.WHOLE, Axis.HIDDEN),
    r"(input|pre_mlp|final)_layernorm|linear_(proj|fc2)\.norm": (Axis.HIDDEN,),
    r"self_attention\.linear_qkv": (Axis.QKV, Axis.HIDDEN),
    r"self_attention\.linear_proj": (Axis.HIDDEN, Axis.HEADS),
    r"self_attention\.core_attention\.softmax_offset": (Axis.EACH_HEAD,),
    r"self_attention\.(rotated_)?[qk]_layernorm": (Axis.ONE_HEAD,),
    r"self_attention\.kv_layernorm": (Axis.WHOLE,),
    r"self_attention\.linear_(q|kv)_down_proj": (Axis.WHOLE, Axis.HIDDEN),
    r"self_attention\.linear_q_proj": (Axis.LATENT_HEADS, Axis.HIDDEN),
    r"self_attention\.linear_(q|kv)_up_proj": (Axis.LATENT_HEADS, Axis.WHOLE),
    r"mlp\.(.+\.)?linear_fc1": (Axis.GATED_FFN, Axis.HIDDEN),
    r"mlp\.(.+\.)?linear_fc2": (Axis.HIDDEN, Axis.FFN),
    r"mlp\.router(\.expert)?": (Axis.EXPERTS, Axis.HIDDEN),
    r"mlp\.shared_experts\.gate": (Axis.WHOLE, Axis.HIDDEN),
}
_KIND = re.compile(r"[._](?:weight|bias)$")
HIDDEN_KEY = "hidden"
"""The key of the hidden channels, which all layers share."""


def axes_of(parameter: str) -> tuple[Axis, ...]:
    """Return the axes of a parameter, a weight's or a bias's, by its name in Megatron.

    Raises:
        ValueError: no rule says what its entries are.
    """
    base = _KIND.sub("", parameter)
    for pattern, axes in _AXES.items():
        if re.search(rf"(?:^|\.)(?:{pattern})$", base):
            return axes if len(axes) == 1 or not parameter.endswith("bias") else axes[:1]
    raise ValueError(
        f"the family has a parameter {parameter}, of which no rule says how it is cut: choose layers alone"
    )


def key_of(axis: Axis, parameter: str) -> str:
    """Name what is cut along an axis: parameters that are cut together have the same key.

    It is `HIDDEN_KEY`, or the Megatron module whose heads, channels or experts they are.
    """
    if axis is Axis.HIDDEN:
        return HIDDEN_KEY
    if axis is Axis.EXPERTS:
        return parameter[: parameter.index("router")] + "router"
    if axis in (Axis.FFN, Axis.GATED_FFN):
        return parameter[: parameter.index(".linear_fc")]
    return parameter[: parameter.index("self_attention")] + "self_attention"
