"""Multi-latent attention in config.json and in Megatron's args: published fields, both ways, and refusals."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest

from megatron_fdd.convert.families import family_of
from megatron_fdd.host.layer_specs import OPTIONS
from megatron_fdd.plan.model_shape import ModelShape, ParallelSizes
from tests.convert import toys
from tests.convert.published import PUBLISHED


def _args(config: dict[str, Any]) -> dict[str, Any]:
    family = family_of(config)
    return {**family.fixed, **family.megatron_args(config)}


@pytest.mark.parametrize(
    ("name", "billions"), [("DeepSeek-V3", 671.0), ("Kimi-K2", 1026.4), ("DeepSeek-V2-Lite", 15.7)]
)
def test_published_sizes(name: str, billions: float) -> None:
    """The shape that Megatron's args describe has the published number of parameters; norms hardly count."""
    args = Namespace(**_args(PUBLISHED[name]))
    shape = ModelShape.of_args(args)
    matrices = shape.matrix_parameters(range(args.num_layers), ParallelSizes(1, 1, 1, 1))
    count = matrices + shape.router_parameters + 2 * args.vocab_size * args.hidden_size
    assert count / 1e9 == pytest.approx(billions, abs=0.05)


def test_positions_of_deepseek_v3() -> None:
    args = _args(PUBLISHED["DeepSeek-V3"])
    named = ("position_embedding_type", "rope_type", "rotary_scaling_factor", "mscale", "mscale_all_dim")
    assert [args[name] for name in named] == ["rope", "yarn", 40.0, 1.0, 1.0]
    assert args[OPTIONS] == {"original_max_position_embeddings": 4096, "beta_fast": 32.0, "beta_slow": 1.0}
    assert (args["kv_channels"], args["group_query_attention"], args["multi_latent_attention"]) == (
        128, False, True,
    )  # fmt: skip
    assert _args(PUBLISHED["Kimi-K2"])[OPTIONS]["beta_fast"] == 1.0
    plain = _args(PUBLISHED["Moonlight-16B-A3B"])
    assert (plain["rope_type"], plain["q_lora_rank"], OPTIONS in plain) == ("rope", None, False)


def test_kimi_k2_is_a_deepseek_v3() -> None:
    config = toys.llama_config("deepseek_v3")
    kimi = {**config, "model_type": "kimi_k2"}
    ours, theirs = family_of(kimi), family_of(config)
    assert ours.megatron_args(kimi) == theirs.megatron_args(config)
    assert ours.rows(kimi) == theirs.rows(config)


@pytest.mark.parametrize("variant", ["deepseek_v3_yarn", "deepseek_v3_short", "deepseek_v2"])
def test_a_trained_checkpoint_of_another_shape(variant: str) -> None:
    seed = toys.llama_config(variant)
    changes = {"q_lora_rank": 12, "kv_lora_rank": 8, "v_head_dim": 4, "kv_channels": 4, "num_layers": 2}
    changes |= {"rotary_base": 5000, "moe_layer_freq": [0, 1]}
    args = _args(seed) | changes
    got = family_of(seed).hf_config(seed, Namespace(**args))
    assert _args(got) == args
    assert (got["q_lora_rank"], got["v_head_dim"], got["num_hidden_layers"]) == (12, 4, 2)


def test_derived_fields_of_transformers_are_accepted() -> None:
    config = toys.llama_config("deepseek_v3", num_local_experts=8, qk_head_dim=14, rope_interleave=True)
    assert _args(config) == _args(toys.llama_config("deepseek_v3"))


YARN = {**toys.YARN, "mscale": 1.0, "mscale_all_dim": 1.0}


@pytest.mark.parametrize(
    ("variant", "changes", "named"),
    [
        ("deepseek_v2", {"topk_method": "group_limited_greedy"}, "topk_method.*adds up.*fdd teach"),
        ("deepseek_v2", {"n_group": 4}, "n_group"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq"),
        ("deepseek_v3", {"head_dim": 14}, "head_dim.* 14, .* has 6"),
        ("deepseek_v3", {"qk_head_dim": 6}, "qk_head_dim.* 6, .* has 14"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads.* has 4"),
        ("deepseek_v3", {"kv_lora_rank": None}, "kv_lora_rank"),
        ("deepseek_v3", {"topk_group": 1}, "topk_group.*best 2"),
        ("deepseek_v3", {"n_group": None}, "n_group.*cannot compute; give the number"),
        ("deepseek_v3", {"head_dim": None}, "head_dim.*cannot compute; give the number"),
        ("deepseek_v3", {"topk_group": None}, "topk_group.*best 2"),
        ("deepseek_v3", {"n_group": 8, "topk_group": 2}, "n_group.*leaves 1 of 8"),
        ("deepseek_v3", {"n_routed_experts": 4}, "n_group.*leaves 1 of 4"),
        ("deepseek_v3", {"num_experts_per_tok": 5}, "topk_group.*4 groups has 2 of 8 experts, .* goes to 5"),
        (
            "deepseek_v3",
            {"topk_group": 5, "num_experts_per_tok": 10, "n_routed_experts": 10, "n_group": 2},
            "2 groups",
        ),
        ("deepseek_v3", {"index_topk": 2048}, "does not understand: index_topk"),
        ("deepseek_v3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ("deepseek_v3", {"rope_scaling": {**YARN, "truncate": False}}, "truncate.*rounds"),
        ("deepseek_v3", {"rope_scaling": {**toys.YARN, "mscale_all_dim": 1.0}}, "mscale_all_dim.*without"),
    ],
)
def test_configs_refused_by_name(variant: str, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        _args(toys.llama_config(variant, **changes))
