"""The shape of a Llama-like model, which config.json and Megatron's args both describe, and how model types differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_fdd.convert.families.expert_naming import ExpertNaming
from megatron_fdd.convert.families.experts import Experts
from megatron_fdd.convert.families.family import HfConfig, LeftOut
from megatron_fdd.convert.families.latent import LATENT_FIELDS, LatentShape
from megatron_fdd.convert.families.layer_kinds import AttentionWindows, Rotation
from megatron_fdd.convert.families.rope import ROPE_KINDS, Rope
from megatron_fdd.host.layer_specs import LayerSpec

# Values that transformers assumes, in all these model types, for fields that config.json leaves out.
COMMON_DEFAULTS: Mapping[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
}
NO_BIASES: Mapping[str, tuple[Any, ...]] = {"attention_bias": (False,), "mlp_bias": (False,)}
# A layer's norms of the hidden state: Megatron's name and Hugging Face's name.
NORMS_BEFORE = (("input_layernorm", "input_layernorm"), ("pre_mlp_layernorm", "post_attention_layernorm"))
# The norms of queries and keys within attention, likewise.
QK_NORMS = (("q_layernorm", "q_norm"), ("k_layernorm", "k_norm"))
QkvBias = Literal["no", "always", "attention_bias"]
Fused = Literal["qkv", "gate_up"]


@dataclass(frozen=True, slots=True)
class Dialect:
    """The differences between a model type and the others shaped like Llama.

    Attributes:
        defaults: values that transformers assumes for fields that config.json leaves out.
        neutral: further fields that can change the function, with the values at which they do not.
        harmless: further fields that do not change the function.
        qkv_bias: when query, key and value have biases and nothing else has: never, always, or if the field
            `attention_bias` is true (elsewhere that field also gives the output projection one).
        qk_norm: whether queries and keys are normalised, per head unless the layer specification says otherwise; or
            the config.json field that says it.
        qk_norm_names: their names within attention, Megatron's and Hugging Face's.
        window_fields: the config.json fields that describe sliding windows; empty if the model type has no windows.
        rotation: in which layers queries and keys are rotated.
        partial_rotary: the part of a head that turns where the config does not say it; None if always all of it turns.
        rope_kinds: the kinds of rotary scaling that the model type can have.
        latent: whether attention is multi-latent.
        fused: matrices that one tensor holds: query, key and value one after the other; gate and up.
        sinks: whether each head has a learned logit that takes attention away from all tokens.
        mlp: names of the MLP's matrices: gate, up and down, or up and down alone.
        norms: a layer's norms of the hidden state, by Megatron's name and by Hugging Face's name.
        norm_biases: whether these, and the final norm, have a bias.
        fixed: Megatron args that differ from those of the others.
        layer_spec: the layers, if they are not Megatron's own.
        left_out: tensors of published files without a place in the table.
        uncut: Megatron args whose size a student shares with its teacher, each with the reason, for people.
        own_fields: config.json fields that no Megatron argument has. They become the options of the layer
            specification, under the same names.
        mlp_block: the module that is the MLP of a dense layer.
        longest: returns the longest sequence that the layers can process, from `own_fields`; None if
            `max_position_embeddings` says it.
        flatten: gives config.json the spelling that this module reads. `restore` reverts it, for a changed config.
    """

    model_type: str
    architecture: str
    defaults: Mapping[str, Any]
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    harmless: frozenset[str] = frozenset()
    qkv_bias: QkvBias = "no"
    qk_norm: bool | str = False
    qk_norm_names: tuple[tuple[str, str], ...] = QK_NORMS
    window_fields: tuple[str, ...] = ()
    rotation: Rotation = Rotation.ALL
    partial_rotary: float | None = None
    rope_kinds: tuple[str, ...] = ROPE_KINDS
    latent: bool = False
    fused: tuple[Fused, ...] = ()
    experts: ExpertNaming | None = None
    sinks: bool = False
    mlp: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    norms: tuple[tuple[str, str], ...] = NORMS_BEFORE
    norm_biases: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)
    layer_spec: LayerSpec | None = None
    left_out: LeftOut | None = None
    uncut: Mapping[str, str] = field(default_factory=dict)
    own_fields: tuple[str, ...] = ()
    mlp_block: str = "mlp"
    longest: Callable[[Mapping[str, Any]], int] | None = None
    flatten: Callable[[HfConfig], HfConfig] = dict
    restore: Callable[[HfConfig], HfConfig] = dict

    @property
    def fields(self) -> set[str]:
        """The config.json fields that this dialect reads beside those of all."""
        experts = () if self.experts is None else self.experts.fields
        norm = (self.qk_norm,) if isinstance(self.qk_norm, str) else ()
        latent = (*LATENT_FIELDS, "qk_head_dim") if self.latent else ()
        return {*self.window_fields, *self.rotation.fields, *experts, *self.own_fields, *norm, *latent}


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """The description of a model that both sides give, under the names of config.json.

    Attributes:
        attention_bias: whether query, key, value and the output projection have biases.
        qkv_bias: whether query, key and value alone have biases.
        qk_norm: whether queries and keys are normalised.
        rotates: for each layer, whether queries and keys are rotated.
        latent: the widths of multi-latent attention, whose `head_dim` is here that of the values; None if attention is
            not multi-latent.
        own: the dialect's `own_fields`.
    """

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    attention_dropout: float
    initializer_range: float
    qkv_bias: bool
    qk_norm: bool
    rope: Rope
    windows: AttentionWindows
    rotates: tuple[bool, ...]
    experts: Experts | None
    latent: LatentShape | None
    own: Mapping[str, Any]

    @staticmethod
    def plain_fields() -> list[str]:
        """List the names that config.json has too, with the same values."""
        others = ("qkv_bias", "qk_norm", "rope", "windows", "rotates", "experts", "latent", "own")
        return [f.name for f in dataclasses.fields(DecoderShape) if f.name not in others]

    def keep_layers(self, layers: Sequence[int]) -> DecoderShape:
        """Return the shape of a model with only these layers (0-based)."""
        return dataclasses.replace(
            self,
            num_hidden_layers=len(layers),
            windows=self.windows.keep_layers(layers),
            rotates=tuple(self.rotates[layer] for layer in layers),
            experts=None if self.experts is None else self.experts.keep_layers(layers),
        )
