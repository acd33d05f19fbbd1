"""Multi-latent attention in config.json and in Megatron's args, and its rows of the table.

Queries, and keys with values, pass a narrow latent with a norm. A part of each head is rotated, and of the keys' that
part is the same in all heads.
"""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_fdd.convert.families.family import HfConfig, MegatronArgs, WeightRow, refuse_field
from megatron_fdd.convert.families.rope import Rope, Yarn
from megatron_fdd.host.field_kinds import above_zero, shown
from megatron_fdd.host.layer_specs import OPTIONS, LayerSpec
from megatron_fdd.host.model_fields import POSITIONS

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.training.models.gpt import GPTModelConfig

# What Megatron's multi-latent attention takes for YaRN and has no flags for, and the field of `Yarn` that it is.
_OPTIONS = {
    "original_max_position_embeddings": ("original", POSITIONS),
    "beta_fast": ("beta_fast", above_zero(1_000)),
    "beta_slow": ("beta_slow", above_zero(1_000)),
}
_ROPE_WITHOUT = {"rotary_scaling_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
LATENT_ROPE_KINDS = ("default", "yarn")


@dataclass(frozen=True, slots=True)
class LatentShape:
    """The widths of multi-latent attention.

    Attributes:
        q_lora_rank: width of the queries' latent; None if one matrix makes queries from the hidden state.
        kv_lora_rank: width of the latent of keys and values.
        qk_nope_head_dim, qk_rope_head_dim: width of the part of a head's query and key that is not rotated, and of the
            part that is.
        v_head_dim: width of a head's value.
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    def megatron_args(self) -> MegatronArgs:
        """Return argparse destinations and values."""
        return {
            "q_lora_rank": self.q_lora_rank,
            "kv_lora_rank": self.kv_lora_rank,
            "qk_head_dim": self.qk_nope_head_dim,
            "qk_pos_emb_head_dim": self.qk_rope_head_dim,
            "v_head_dim": self.v_head_dim,
        }

    @classmethod
    def of_args(cls, args: Namespace) -> LatentShape:
        """Read the widths from Megatron's args."""
        return cls(
            args.q_lora_rank, args.kv_lora_rank, args.qk_head_dim, args.qk_pos_emb_head_dim, args.v_head_dim
        )

    def derived(self) -> dict[str, int]:
        """Return the fields that transformers writes beside these: the width that turns, and that of a whole query."""
        return {
            "head_dim": self.qk_rope_head_dim,
            "qk_head_dim": self.qk_nope_head_dim + self.qk_rope_head_dim,
        }

    def write(self, config: HfConfig) -> None:
        """Set the fields of `config` that describe the widths."""
        config |= dataclasses.asdict(self)
        config |= {field: width for field, width in self.derived().items() if field in config}


LATENT_FIELDS = tuple(field.name for field in dataclasses.fields(LatentShape))


def read_latent(config: Mapping[str, Any], heads: tuple[int, int]) -> LatentShape:
    """Read the widths from config.json.

    Args:
        heads: number of heads of queries, and of keys and values.

    Raises:
        ValueError: a width is missing, or one that config.json repeats is another.
    """
    for field in LATENT_FIELDS[1:]:
        if config.get(field) is None:
            raise ValueError(f'config.json lacks "{field}"')
    widths: dict[str, Any] = {field: config.get(field) for field in LATENT_FIELDS}
    latent = LatentShape(**widths)
    check_latent_rope(config)
    repeated = {field: (config.get(field), width) for field, width in latent.derived().items()}
    repeated["num_key_value_heads"] = (heads[1], heads[0])
    for field, (found, expected) in repeated.items():
        if found not in (None, expected):
            refuse_field(field, found, f"where multi-latent attention of these widths has {expected}")
    return latent


def check_latent_rope(config: Mapping[str, Any]) -> None:
    """Refuse YaRN with `mscale_all_dim` alone, which scales attention and not the rotation."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if isinstance(rope, dict) and rope.get("mscale_all_dim") and not rope.get("mscale"):
        refuse_field(
            "mscale_all_dim", rope["mscale_all_dim"], "without mscale, and Megatron has both or neither"
        )


def latent_rope_args(rope: Rope) -> tuple[MegatronArgs, dict[str, Any]]:
    """Return argparse destinations and values for rotary positions, and the options of `latent_spec`.

    Raises:
        ValueError: Megatron's multi-latent attention cannot do something; the message names it.
    """
    plain = dataclasses.replace(rope, scaling=None).megatron_args()
    if rope.scaling is None:
        return {**plain, **_ROPE_WITHOUT, "rope_type": "rope"}, {}
    assert isinstance(rope.scaling, Yarn)
    if not rope.scaling.truncate:
        refuse_field(
            "truncate", False, "and Megatron's multi-latent attention always rounds the bounds of YaRN"
        )
    yarn = {
        "rope_type": "yarn",
        "rotary_scaling_factor": rope.scaling.factor,
        "mscale": rope.scaling.mscale,
        "mscale_all_dim": rope.scaling.mscale_all_dim,
    }
    return {**plain, **yarn}, {name: getattr(rope.scaling, field) for name, (field, _) in _OPTIONS.items()}


def latent_rope_of_args(args: Namespace) -> Rope:
    """Read the rotary positions from Megatron's args."""
    if args.rope_type == "rope":
        return Rope(args.rotary_base)
    options = getattr(args, OPTIONS)
    scaling = Yarn(
        factor=args.rotary_scaling_factor,
        mscale=args.mscale,
        mscale_all_dim=args.mscale_all_dim,
        **{field: options[name] for name, (field, _) in _OPTIONS.items()},
    )
    return Rope(args.rotary_base, scaling)


def latent_rows(latent: LatentShape, layer: int) -> list[WeightRow]:
    """Return the rows of one layer's attention. Both sides keep every matrix in the same way."""
    names = {
        "linear_q_down_proj": "q_a_proj",
        "q_layernorm": "q_a_layernorm",
        "linear_q_up_proj": "q_b_proj",
    }
    if latent.q_lora_rank is None:
        names = {"linear_q_proj": "q_proj"}
    names |= {
        "linear_kv_down_proj": "kv_a_proj_with_mqa",
        "kv_layernorm": "kv_a_layernorm",
        "linear_kv_up_proj": "kv_b_proj",
        "linear_proj": "o_proj",
    }
    hf, mcore = f"model.layers.{layer}.self_attn.", f"decoder.layers.{layer}.self_attention."
    return [WeightRow(f"{mcore}{ours}.weight", (f"{hf}{theirs}.weight",)) for ours, theirs in names.items()]


def _configure(config: GPTModelConfig, options: Mapping[str, Any]) -> None:
    """Set what Megatron has no flags for.

    Raises:
        ValueError: an option is missing or of the wrong kind, or a flag asks for other layers.
    """
    transformer = config.transformer
    if transformer.mla_down_proj_fusion:
        raise ValueError(
            "--mla-down-proj-fusion: not with layers of a family's own, whose down projections are two matrices; "
            "leave it out"
        )
    # Megatron would sum the gradient of `q_layernorm` over tensor-parallel ranks that all have the whole of it.
    transformer.qk_layernorm = False
    if transformer.rope_type == "rope":
        return
    for name, (_, kind) in _OPTIONS.items():
        if not kind.fits(options.get(name)):
            raise ValueError(
                f"the checkpoint's {OPTIONS} have {name} = {shown(options.get(name))}, which must be {kind.words}"
            )
        setattr(transformer, name, options[name])


def _build(config: GPTModelConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    from megatron_fdd.host.latent_attention import latent_layers

    return latent_layers(config, vp_stage)


LATENT_SPEC = LayerSpec(_build, _configure)
