"""Families with their own layers: flags that the layers cannot do, values that no argument says, and own spellings."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest
import torch

from megatron_fdd.convert.families import FAMILIES, family_of
from megatron_fdd.convert.mcore_model import complete_args
from megatron_fdd.host.model import build_config
from tests.convert import toys


def _args(config: dict[str, Any]) -> dict[str, Any]:
    return family_of(config).megatron_args(config)


def _complete(config: dict[str, Any]) -> Namespace:
    architecture = {**family_of(config).fixed, **_args(config)}
    return complete_args(architecture, dtype=torch.float32, vocabulary_divisor=8)


@pytest.mark.parametrize(
    ("variant", "changes", "named"),
    [
        ("ministral3", {"seq_length": 41}, "--seq-length 41: .*ministral3.*at most 40.*fdd teach"),
        ("llama4_text", {"seq_length": 8192}, "--seq-length 8192: .*llama4_text.*at most 8191.*fdd teach"),
        ("ernie4_5_moe", {"moe_router_fusion": True}, "--moe-router-fusion.*ernie4_5_moe"),
        ("ernie4_5_moe", {"moe_aux_loss_coeff": 0.01}, "--moe-aux-loss-coeff"),
        (
            "gemma2",
            {"transformer_impl": "transformer_engine"},
            r"--transformer-impl transformer_engine: .*gemma2 have a soft cap \(attn_logit_softcapping 1.5\).*local",
        ),
        (
            "cohere2",
            {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
            "--recompute-modules mlp.*cohere2",
        ),
    ],
)
def test_flags_that_layers_cannot_do(variant: str, changes: dict[str, Any], named: str) -> None:
    args = _complete(toys.llama_config(variant))
    build_config(args)
    vars(args).update(changes)
    with pytest.raises(ValueError, match=named):
        build_config(args)


def test_cuda_graphs_of_a_layer_of_ours() -> None:
    config = build_config(_complete(toys.llama_config("cohere2")))
    config.transformer.cuda_graph_impl = "local"
    spec = FAMILIES["cohere2"].layer_spec
    assert spec is not None
    with pytest.raises(ValueError, match="--cuda-graph-impl local.*cohere2"):
        spec.configure(config, {"logit_scale": 0.5})


def test_the_longest_sequence_that_an_import_stores() -> None:
    config = toys.llama_config("llama4_text", max_position_embeddings=10**6, floor_scale=4096)
    assert _args(config)["seq_length"] == 4095
    assert _args(toys.llama_config("ministral3"))["seq_length"] == 40
    build_config(_complete(config))


@pytest.mark.parametrize(("variant", "rotating"), [("cohere2", False), ("exaone4", True)])
def test_rotation_without_any_window(variant: str, rotating: bool) -> None:
    changes = {"sliding_window": None, "layer_types": ["full_attention"] * 3}
    args = _args(toys.llama_config(variant, **changes))
    assert args["no_rope_freq"] == (None if rotating else [1, 1, 1])
    assert args["window_size"] is None


def test_the_fields_that_minimax_writes_beside_those_of_transformers() -> None:
    fields = {
        "attn_type_list": [1, 1, 1],
        "layernorm_full_attention_beta": 1.0,
        "mlp_intermediate_size": 8192,
        "num_mtp_modules": 3,
        "qk_norm_type": "per_layer",
        "scoring_func": "sigmoid",
        "shared_intermediate_size": 0,
        "use_mtp": True,
        "use_routing_bias": True,
    }
    config = toys.llama_config("minimax_m2")
    assert _args({**config, **fields}) == _args(config)
    assert _args(config)["rotary_percent"] == 0.6


def test_a_stretched_rotary_base() -> None:
    config = build_config(_complete(toys.llama_config("hunyuan_v1_dense")))
    assert config.rotary_base == pytest.approx(1e4 * 1000 ** (10 / 8))


@pytest.mark.parametrize(
    "variant", ["hunyuan_v1_dense", "ernie4_5_moe", "cohere2", "llama4_text", "olmo3", "ministral3"]
)
def test_a_trained_model_of_other_shape_keeps_its_spelling(variant: str) -> None:
    seed = toys.llama_config(variant)
    args = {**_args(seed), "max_position_embeddings": 30, "seq_length": 30}
    got = family_of(seed).hf_config(seed, Namespace(**args))
    assert _args(got) == args
    changed = {name for name in {*got, *seed} if got.get(name) != seed.get(name)}
    defaults = {"layer_types", "moe_layers", "moe_layer_interval", "interleave_moe_layer_step"}
    assert changed - defaults == {"max_position_embeddings"}
