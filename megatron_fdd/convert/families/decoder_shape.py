"""The shape of a Llama-like model, which config.json and Megatron's args both describe, and how model types differ."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_fdd.convert.families.family import HfConfig, MegatronArgs
from megatron_fdd.convert.families.rope import Rope
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
# What the routers of these families do not do, by Megatron's arguments.
FIXED_EXPERTS: dict[str, Any] = {
    "moe_router_score_function": "softmax",
    "moe_router_topk_scaling_factor": None,
    "moe_router_num_groups": None,
    "moe_router_group_topk": None,
    "moe_router_enable_expert_bias": False,
    "moe_apply_probs_on_input": False,
    "moe_latent_size": None,
    "moe_mlp_glu_interleave_size": None,
    "moe_shared_expert_intermediate_size": None,
}


@dataclass(frozen=True, slots=True)
class ExpertNaming:
    """The names under which a model type keeps its experts.

    Attributes:
        block: the module that replaces the MLP.
        projections: names of gate, up and down in an expert.
        count_fields: config.json fields that may hold the number of experts, the usual one first.
        width_field: config.json field with the width of one expert.
        mixed: whether layers may be dense; their width is then `intermediate_size`.
    """

    block: str
    projections: tuple[str, str, str]
    count_fields: tuple[str, ...]
    width_field: str
    mixed: bool


@dataclass(frozen=True, slots=True)
class Dialect:
    """The differences between a model type and the others shaped like Llama.

    Attributes:
        defaults: values that transformers assumes for fields that config.json leaves out.
        neutral: further fields that can change the function, with the values at which they do not.
        harmless: further fields that do not change the function.
        qkv_bias: whether query, key and value have biases, and nothing else has.
        qk_norm: whether queries and keys are normalised, per head unless the layer specification says otherwise.
        window_fields: the config.json fields that describe sliding windows; empty if the model type has no windows.
        norms: a layer's norms of the hidden state, by Megatron's name and by Hugging Face's name.
        fixed: Megatron args that differ from those of the others.
        layer_spec: the layers, if they are not Megatron's own.
        own_fields: config.json fields that no Megatron argument has. They become the options of the layer
            specification, under the same names.
        flatten: gives config.json the spelling that this module reads. `restore` reverts it, for a changed config.
    """

    model_type: str
    architecture: str
    defaults: Mapping[str, Any]
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    harmless: frozenset[str] = frozenset()
    qkv_bias: bool = False
    qk_norm: bool = False
    window_fields: tuple[str, ...] = ()
    experts: ExpertNaming | None = None
    norms: tuple[tuple[str, str], ...] = NORMS_BEFORE
    fixed: Mapping[str, Any] = field(default_factory=dict)
    layer_spec: LayerSpec | None = None
    own_fields: tuple[str, ...] = ()
    flatten: Callable[[HfConfig], HfConfig] = dict
    restore: Callable[[HfConfig], HfConfig] = dict

    @property
    def expert_fields(self) -> tuple[str, ...]:
        """The config.json fields that describe experts."""
        if self.experts is None:
            return ()
        mixed = ("norm_topk_prob", "decoder_sparse_step", "mlp_only_layers") if self.experts.mixed else ()
        return (*self.experts.count_fields, self.experts.width_field, "num_experts_per_tok", *mixed)


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


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts.

    Attributes:
        count: number of experts in a layer.
        per_token: number of experts that process a token.
        width: the width of one expert.
        normalised: whether the weights of a token's experts sum to 1.
        sparse: for each layer, whether it has experts.
    """

    count: int
    per_token: int
    width: int
    normalised: bool
    sparse: tuple[bool, ...]

    def megatron_args(self) -> MegatronArgs:
        """Return argparse destinations and values."""
        return {
            "num_experts": self.count,
            "moe_router_topk": self.per_token,
            "moe_ffn_hidden_size": self.width,
            # The softmax over a token's experts alone equals the normalised softmax over all experts.
            "moe_router_pre_softmax": not self.normalised,
            "moe_layer_freq": 1 if all(self.sparse) else [int(sparse) for sparse in self.sparse],
        }

    @classmethod
    def of_args(cls, args: Namespace) -> Experts:
        """Read the experts from Megatron's args. ValueError if they describe a dense model."""
        if args.num_experts is None:
            raise ValueError("the checkpoint has no experts, and the Hugging Face config has")
        rule = args.moe_layer_freq
        if isinstance(rule, int):
            rule = [layer % rule == 0 for layer in range(args.num_layers)]
        return cls(
            count=args.num_experts,
            per_token=args.moe_router_topk,
            width=args.moe_ffn_hidden_size or args.ffn_hidden_size,
            normalised=not args.moe_router_pre_softmax,
            sparse=tuple(bool(one) for one in rule),
        )


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """The description of a model that both sides give, under the names of config.json; `own` holds the `own_fields`."""

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
    rope: Rope
    windows: AttentionWindows
    experts: Experts | None
    own: Mapping[str, Any]

    @staticmethod
    def plain_fields() -> list[str]:
        """List the names that config.json has too, with the same values."""
        others = ("rope", "windows", "experts", "own")
        return [f.name for f in dataclasses.fields(DecoderShape) if f.name not in others]

    def keep_layers(self, layers: Sequence[int]) -> DecoderShape:
        """Return the shape of a model with only these layers (0-based)."""
        slides = tuple(self.windows.slides[layer] for layer in layers)
        experts = self.experts
        if experts is not None:
            sparse = tuple(experts.sparse[layer] for layer in layers)
            experts = dataclasses.replace(experts, sparse=sparse)
        windows = dataclasses.replace(self.windows, slides=slides).effective
        return dataclasses.replace(self, num_hidden_layers=len(layers), windows=windows, experts=experts)
