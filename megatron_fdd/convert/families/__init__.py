"""The families that can be converted, and the reasons why some requested ones cannot.

`add_family` adds a family from outside this package (docs/extend/family.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_fdd.convert.families import (
    cohere2,
    deepseek,
    ernie_moe,
    exaone4,
    gemma2,
    gemma3,
    glm4,
    gpt2,
    gpt_oss,
    granite,
    hunyuan,
    layer_norm,
    llama,
    llama4,
    llama_like,
    ministral3,
    mistral,
    moe,
    multimodal,
    olmo2,
    olmo3,
    over_heads,
    phi3,
    qwen,
    shared_experts,
)
from megatron_fdd.convert.families.config_fields import check_kinds
from megatron_fdd.convert.families.family import Family, check_record
from megatron_fdd.host.field_kinds import shown
from megatron_fdd.host.layer_specs import NAME, add_layer_spec
from megatron_fdd.host.plugins import REMEDY

_ALL = (
    gpt2.GPT2, llama.LLAMA, mistral.MISTRAL, qwen.QWEN2, qwen.QWEN3, moe.MIXTRAL, moe.QWEN3_MOE, olmo2.OLMO2,
    gemma2.GEMMA2, gemma3.GEMMA3_TEXT, llama_like.SEED_OSS, llama_like.SMOLLM3, llama_like.ERNIE4_5, phi3.PHI3,
    shared_experts.QWEN2_MOE, shared_experts.GLM4_MOE, gpt_oss.GPT_OSS,
    layer_norm.NEMOTRON, layer_norm.STARCODER2, deepseek.DEEPSEEK_V2, deepseek.DEEPSEEK_V3, deepseek.KIMI_K2,
    granite.GRANITE, glm4.GLM4, exaone4.EXAONE4, over_heads.OLMOE, over_heads.MINIMAX_M2,
    olmo3.OLMO3, hunyuan.HUNYUAN_V1_DENSE, granite.GRANITEMOE, ernie_moe.ERNIE4_5_MOE, cohere2.COHERE2,
    llama4.LLAMA4_TEXT, ministral3.MINISTRAL3,
)  # fmt: skip
FAMILIES: dict[str, Family] = {}
# Models of text and images, whose text part is of one of these families.
MULTIMODAL = {each.model_type: each for each in (multimodal.MISTRAL3, multimodal.GEMMA3, multimodal.LLAMA4)}

# Parts of these models that Megatron's arguments (0.19.2) cannot describe; nobody has written a layer specification.
_SIDE_BY_SIDE = "attention and MLP side by side on one input"
NOT_EXPRESSIBLE: dict[str, tuple[str, ...]] = {
    "gemma": (
        "an MLP gated by GELU with tanh",
        "embeddings times sqrt(hidden_size)",
        "norms that scale by 1 + weight",
    ),
    "cohere": (_SIDE_BY_SIDE, "queries and keys normalised by a LayerNorm of their own", "scaled logits"),
    "phi": (_SIDE_BY_SIDE,),
    "bloom": ("ALiBi instead of positions",),
    "opt": ("positions that start at 2", "ReLU"),
    "qwen3_next": (
        "gated linear attention in three layers of four, for which Megatron needs another package",
    ),
}


def add_family(family: Family) -> None:
    """Add a family, so that its models can be converted and trained.

    If the family has a `layer_spec`, checkpoints name it by the model type.

    Raises:
        ValueError: this model type has a family already, or a field of the record is of another type.
    """
    check_record(family)
    if family.model_type in {**FAMILIES, **MULTIMODAL}:
        raise ValueError(f"there is a family for the model type {family.model_type!r} already; add it once")
    name = None
    if family.layer_spec is not None:
        name = family.model_type
        add_layer_spec(name, family.layer_spec)
    FAMILIES[family.model_type] = dataclasses.replace(family, fixed={**family.fixed, NAME: name})


for _family in _ALL:
    add_family(_family)


def family_of(config: Mapping[str, Any]) -> Family:
    """Find the family that a config.json belongs to.

    Raises:
        ValueError: no family has this `model_type`, and the message gives the reason if it is known; or a field has a
            type or a range without a meaning.
    """
    found = config.get("model_type")
    model_type = found if isinstance(found, str) else ""
    if model_type in FAMILIES:
        check_kinds(config)
        return FAMILIES[model_type]
    if model_type in MULTIMODAL:
        check_kinds(config)
        return MULTIMODAL[model_type].family(config, FAMILIES)
    message = f'config.json says "model_type": {shown(found)}'
    if model_type in NOT_EXPRESSIBLE:
        message += (
            f", which neither Megatron's arguments nor a family here can describe; it has "
            f"{'; '.join(NOT_EXPRESSIBLE[model_type])}"
        )
    known = ", ".join(sorted({*FAMILIES, *MULTIMODAL}))
    raise ValueError(
        f"{message}. The model types that can be converted are {known}; as a teacher "
        f"others run with fdd teach --engine transformers; {REMEDY}"
    )
