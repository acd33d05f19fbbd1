"""The table of a Llama-like model: the Hugging Face tensors that each Megatron parameter holds."""

from __future__ import annotations

from megatron_fdd.convert.families.decoder_shape import DecoderShape, Dialect, ExpertNaming
from megatron_fdd.convert.families.family import WeightRow
from megatron_fdd.convert.families.transforms import GroupedQkv, Stacked


def decoder_rows(dialect: Dialect, shape: DecoderShape) -> list[WeightRow]:
    """Return the rows of all parameters, in the order of an export."""
    rows = [WeightRow("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), vocabulary=True)]
    for layer in range(shape.num_hidden_layers):
        first, *others = _norm_rows(dialect, layer)
        rows += [first, *_attention_rows(dialect, shape, layer), *others]
        if shape.experts is not None and shape.experts.sparse[layer]:
            assert dialect.experts is not None
            rows += _expert_rows(dialect.experts, shape.experts.count, layer)
        else:
            rows += _mlp_rows(shape, layer)
    rows.append(WeightRow("decoder.final_layernorm.weight", ("model.norm.weight",)))
    if not shape.tie_word_embeddings:
        rows.append(WeightRow("output_layer.weight", ("lm_head.weight",), vocabulary=True))
    return rows


def _norm_rows(dialect: Dialect, layer: int) -> list[WeightRow]:
    return [
        WeightRow(f"decoder.layers.{layer}.{mcore}.weight", (f"model.layers.{layer}.{hf}.weight",))
        for mcore, hf in dialect.norms
    ]


def _attention_rows(dialect: Dialect, shape: DecoderShape, layer: int) -> list[WeightRow]:
    hf, mcore = f"model.layers.{layer}.", f"decoder.layers.{layer}."
    qkv = GroupedQkv(shape.num_attention_heads // shape.num_key_value_heads, shape.head_dim)
    rows = []
    for kind in ("weight", "bias"):
        # Megatron has all biases, or those of query, key and value; the ones that the model lacks are 0.
        in_megatron = kind == "weight" or shape.attention_bias or shape.mlp_bias
        present = kind == "weight" or shape.attention_bias
        names = tuple(f"{hf}self_attn.{part}_proj.{kind}" for part in "qkvo")
        if in_megatron or dialect.qkv_bias:
            sources = names[:3] if present or dialect.qkv_bias else ()
            rows.append(WeightRow(f"{mcore}self_attention.linear_qkv.{kind}", sources, qkv))
        if in_megatron:
            rows.append(WeightRow(f"{mcore}self_attention.linear_proj.{kind}", names[3:] if present else ()))
    if dialect.qk_norm:
        rows += [
            WeightRow(
                f"{mcore}self_attention.{part}_layernorm.weight", (f"{hf}self_attn.{part}_norm.weight",)
            )
            for part in "qk"
        ]
    return rows


def _mlp_rows(shape: DecoderShape, layer: int) -> list[WeightRow]:
    hf, mcore = f"model.layers.{layer}.", f"decoder.layers.{layer}."
    rows = []
    for kind in ("weight", "bias")[: 1 + (shape.attention_bias or shape.mlp_bias)]:
        present = kind == "weight" or shape.mlp_bias
        names = tuple(f"{hf}mlp.{part}_proj.{kind}" for part in ("gate", "up", "down")) if present else ()
        rows += [
            WeightRow(f"{mcore}mlp.linear_fc1.{kind}", names[:2], Stacked(2)),
            WeightRow(f"{mcore}mlp.linear_fc2.{kind}", names[2:]),
        ]
    return rows


def _expert_rows(naming: ExpertNaming, count: int, layer: int) -> list[WeightRow]:
    hf, mcore = f"model.layers.{layer}.{naming.block}.", f"decoder.layers.{layer}.mlp."
    rows = [WeightRow(f"{mcore}router.weight", (f"{hf}gate.weight",))]
    for expert in range(count):
        gate, up, down = (f"{hf}experts.{expert}.{name}.weight" for name in naming.projections)
        rows += [
            WeightRow(f"{mcore}experts.local_experts.{expert}.linear_fc1.weight", (gate, up), Stacked(2)),
            WeightRow(f"{mcore}experts.local_experts.{expert}.linear_fc2.weight", (down,)),
        ]
    return rows
