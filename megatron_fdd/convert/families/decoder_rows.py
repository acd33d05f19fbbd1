"""The table of a Llama-like model: the Hugging Face tensors that each Megatron parameter holds."""

from __future__ import annotations

from itertools import chain

import torch

from megatron_fdd.convert.families.decoder_shape import DecoderShape, Dialect
from megatron_fdd.convert.families.expert_naming import ExpertNaming, StackedNaming
from megatron_fdd.convert.families.experts import Experts
from megatron_fdd.convert.families.family import WeightRow, slice_name
from megatron_fdd.convert.families.latent import latent_rows
from megatron_fdd.convert.families.transforms import (
    Alternating,
    FusedQkv,
    GroupedQkv,
    OneRow,
    Same,
    Stacked,
    Transform,
    Transposed,
)


def decoder_rows(dialect: Dialect, shape: DecoderShape) -> list[WeightRow]:
    """Return the rows of all parameters, in the order of an export."""
    rows = [WeightRow("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), vocabulary=True)]
    for layer in range(shape.num_hidden_layers):
        first, *others = (
            _norm_rows(dialect, f"decoder.layers.{layer}.{mcore}", f"model.layers.{layer}.{hf}")
            for mcore, hf in dialect.norms
        )
        rows += [*first, *_attention_rows(dialect, shape, layer), *chain(*others)]
        if shape.experts is not None and shape.experts.sparse[layer]:
            assert dialect.experts is not None
            biased = shape.attention_bias or shape.mlp_bias
            rows += _expert_rows(dialect.experts, shape.experts, layer, biased=biased)
        else:
            rows += _mlp_rows(dialect, shape, layer)
    rows += _norm_rows(dialect, "decoder.final_layernorm", "model.norm")
    if not shape.tie_word_embeddings:
        rows.append(WeightRow("output_layer.weight", ("lm_head.weight",), vocabulary=True))
    return rows


def _norm_rows(dialect: Dialect, mcore: str, hf: str) -> list[WeightRow]:
    kinds = ("weight", "bias")[: 1 + dialect.norm_biases]
    return [WeightRow(f"{mcore}.{kind}", (f"{hf}.{kind}",)) for kind in kinds]


def _attention_rows(dialect: Dialect, shape: DecoderShape, layer: int) -> list[WeightRow]:
    if shape.latent is not None:
        return latent_rows(shape.latent, layer)
    hf, mcore = f"model.layers.{layer}.", f"decoder.layers.{layer}."
    grouped = GroupedQkv(shape.num_attention_heads // shape.num_key_value_heads, shape.head_dim)
    fused = "qkv" in dialect.fused
    qkv: Transform = FusedQkv(grouped) if fused else grouped
    parts = ("qkv_proj",) if fused else ("q_proj", "k_proj", "v_proj")
    rows = []
    for kind in ("weight", "bias"):
        # Megatron has all biases, or those of query, key and value; the ones that the model lacks are 0.
        in_megatron = kind == "weight" or shape.attention_bias or shape.mlp_bias
        present = kind == "weight" or shape.attention_bias
        if in_megatron or shape.qkv_bias:
            names = tuple(f"{hf}self_attn.{part}.{kind}" for part in parts)
            sources = names if present or shape.qkv_bias else ()
            rows.append(WeightRow(f"{mcore}self_attention.linear_qkv.{kind}", sources, qkv))
        if in_megatron:
            output = (f"{hf}self_attn.o_proj.{kind}",) if present else ()
            rows.append(WeightRow(f"{mcore}self_attention.linear_proj.{kind}", output))
    if shape.qk_norm:
        rows += [
            WeightRow(f"{mcore}self_attention.{own}.weight", (f"{hf}self_attn.{theirs}.weight",))
            for own, theirs in dialect.qk_norm_names
        ]
    if dialect.sinks:
        rows.append(
            WeightRow(f"{mcore}self_attention.core_attention.softmax_offset", (f"{hf}self_attn.sinks",))
        )
    return rows


def _mlp_rows(dialect: Dialect, shape: DecoderShape, layer: int) -> list[WeightRow]:
    hf, mcore = f"model.layers.{layer}.", f"decoder.layers.{layer}."
    fused = "gate_up" in dialect.fused
    *first, down = ("gate_up_proj", "down_proj") if fused else dialect.mlp
    transform: Transform = Same() if len(first) == 1 else Stacked(2)
    rows = []
    for kind in ("weight", "bias")[: 1 + (shape.attention_bias or shape.mlp_bias)]:
        present = kind == "weight" or shape.mlp_bias
        names = tuple(f"{hf}{dialect.mlp_block}.{part}.{kind}" for part in (*first, down)) if present else ()
        rows += [
            WeightRow(f"{mcore}mlp.linear_fc1.{kind}", names[:-1], transform),
            WeightRow(f"{mcore}mlp.linear_fc2.{kind}", names[-1:]),
        ]
    return rows


def _expert_rows(naming: ExpertNaming, experts: Experts, layer: int, *, biased: bool) -> list[WeightRow]:
    hf, mcore = f"model.layers.{layer}.{naming.block}.", f"decoder.layers.{layer}.mlp."
    router_dtype = torch.float32 if naming.own_router else None
    rows = [WeightRow(f"{mcore}router.weight", (f"{hf}{naming.router}",), dtype=router_dtype)]
    if naming.router_bias is not None:
        rows.append(WeightRow(f"{mcore}router.bias", (f"{hf}{naming.router_bias}",)))
    if naming.bias is not None:
        arranged = OneRow() if naming.own_router else Same()
        sources = (f"{hf}{naming.bias}",)
        rows.append(WeightRow(f"{mcore}router.expert_bias", sources, arranged, dtype=torch.float32))
    local = f"{mcore}experts.local_experts"
    if naming.stacked is not None:
        rows += _stacked_rows(local, hf, naming.stacked, experts.count, biased=biased)
    else:
        for expert in range(experts.count):
            rows += _glu_rows(f"{local}.{expert}.", f"{hf}experts.{expert}.", naming.projections)
    if naming.shared is not None and experts.shared_width:
        rows += _glu_rows(f"{mcore}shared_experts.", f"{hf}{naming.shared.block}.", naming.projections)
        if naming.shared.gate is not None:
            rows.append(WeightRow(f"{mcore}shared_experts.gate_weight", (f"{hf}{naming.shared.gate}",)))
    return rows


def _stacked_rows(mcore: str, hf: str, naming: StackedNaming, count: int, *, biased: bool) -> list[WeightRow]:
    first: Transform = Alternating() if naming.alternates else Same()
    matrices = (naming.gate_up, "linear_fc1", first), (naming.down, "linear_fc2", Same())
    rows = []
    for tensor, linear, transform in matrices:
        weight = Transposed(transform) if naming.is_transposed else transform
        for kind, ending, arranged in (("weight", "", weight), ("bias", "_bias", transform))[: 1 + biased]:
            rows += [
                WeightRow(
                    f"{mcore}.{expert}.{linear}.{kind}",
                    (slice_name(f"{hf}{tensor}{ending}", expert),),
                    arranged,
                )
                for expert in range(count)
            ]
    return rows


def _glu_rows(mcore: str, hf: str, projections: tuple[str, str, str]) -> list[WeightRow]:
    gate, up, down = (f"{hf}{name}.weight" for name in projections)
    return [
        WeightRow(f"{mcore}linear_fc1.weight", (gate, up), Stacked(2)),
        WeightRow(f"{mcore}linear_fc2.weight", (down,)),
    ]
