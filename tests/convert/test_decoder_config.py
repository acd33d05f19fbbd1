"""Differences between the model types shaped like Llama: windows, experts, biases, and a student of some layers."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest

from megatron_fdd.convert.families import family_of
from tests.convert import toys


def _args(config: dict[str, Any]) -> dict[str, Any]:
    return family_of(config).megatron_args(config)


WINDOWS = {
    "mistral": (None, None),
    "mistral_window": ((6, 0), None),
    "qwen2": (None, None),
    "qwen2_window": ((8, 0), [0, 0, 1]),
    "qwen3_types": ((4, 0), [1, 0, 1]),
    "mixtral_window": ((5, 0), None),
    "qwen3_moe_mixed": ((7, 0), None),
}


@pytest.mark.parametrize("variant", list(WINDOWS))
def test_windows(variant: str) -> None:
    args = _args(toys.llama_config(variant))
    assert (args["window_size"], args["window_attn_skip_freq"]) == WINDOWS[variant]


def test_absent_windows_are_those_of_transformers() -> None:
    mistral = toys.llama_config("mistral")
    del mistral["sliding_window"]
    assert _args(mistral)["window_size"] == (4095, 0)
    qwen = toys.llama_config("qwen2_window")
    del qwen["sliding_window"], qwen["max_window_layers"]  # the default, 28, is beyond these three layers
    assert _args(qwen)["window_size"] is None
    assert (
        _args(toys.llama_config("qwen2_window", max_window_layers=0, sliding_window=None))["window_size"]
        is None
    )


def test_windows_that_are_off_may_have_the_size_that_transformers_writes() -> None:
    """transformers 5 writes 0 for a Qwen2-MoE whose published size is 4096."""
    config = toys.llama_config("qwen2_moe", sliding_window=0, use_sliding_window=False)
    args = _args(config)
    assert args["window_size"] is None
    assert family_of(config).hf_config(config, Namespace(**args)) == config
    for variant in ("qwen2_moe", "mistral_window", "gemma3_text"):
        on = {"use_sliding_window": True} if variant == "qwen2_moe" else {}
        with pytest.raises(ValueError, match="sliding_window.* 0, which must be at least 1, or null"):
            _args(toys.llama_config(variant, sliding_window=0, **on))


def test_a_rotary_base_that_is_no_whole_number() -> None:
    """StarCoder2-3B has one. Only Megatron's command line wants a whole number."""
    args = _args(toys.llama_config("starcoder2", rope_theta=999999.4420358813))
    assert args["rotary_base"] == 999999.4420358813
    whole = _args(toys.llama_config("starcoder2", rope_theta=1e6))["rotary_base"]
    assert (whole, type(whole)) == (1000000, int)


def test_experts() -> None:
    args = _args(toys.llama_config("qwen3_moe_mixed"))
    names = (
        "num_experts",
        "moe_router_topk",
        "moe_ffn_hidden_size",
        "ffn_hidden_size",
        "moe_router_pre_softmax",
    )
    assert [args[name] for name in names] == [4, 2, 24, 66, True]
    assert args["moe_layer_freq"] == [1, 0, 1]
    assert _args(toys.llama_config("qwen3_moe"))["moe_layer_freq"] == 1
    every_second = toys.llama_config("qwen3_moe", decoder_sparse_step=2)
    assert _args(every_second)["moe_layer_freq"] == [0, 1, 0]
    assert _args(toys.llama_config("mixtral"))["moe_ffn_hidden_size"] == 64


@pytest.mark.parametrize("variant", list(toys.VARIANTS))
def test_a_student_of_some_layers(variant: str) -> None:
    config = toys.llama_config(variant)
    family = family_of(config)
    student, args, whole = family.keep_layers(config, [0, 2]), None, _args(config)
    args = _args(student)
    assert args["num_layers"] == 2
    differing = {name for name in args if args[name] != whole[name]}
    assert differing <= {
        "num_layers",
        "window_size",
        "window_attn_skip_freq",
        "moe_layer_freq",
        "no_rope_freq",
    }
    kept = {
        "qwen2_window": [0, 1],
        "gemma3_text": [1, 0],
        "exaone4": [1, 0],
        "olmo3": [1, 0],
        "cohere2": [1, 0],
        "qwen3_types": None,
        "qwen3_moe_mixed": None,
    }
    assert args["window_attn_skip_freq"] == kept.get(variant)
    sparse = {
        **dict.fromkeys(("qwen2_moe", "deepseek_v3_dense", "llama4_text"), [0, 0]),
        **dict.fromkeys(("glm4_moe", "ernie4_5_moe"), [0, 1]),
    }
    default = [0, 1] if variant.startswith("deepseek") else 1
    assert args.get("moe_layer_freq", 1) == sparse.get(variant, default)
    assert args["no_rope_freq"] == {"exaone4": [0, 1], "cohere2": [0, 1], "llama4_text": [0, 1]}.get(variant)
    assert family.keep_layers(config, [0, 1, 2]) == config


@pytest.mark.parametrize("variant", ["qwen2_window", "qwen3_types", "mixtral", "qwen3_moe_mixed"])
def test_a_trained_checkpoint_of_another_shape(variant: str) -> None:
    """The args come from a run with other windows, experts and depth than the seed config says."""
    seed = toys.llama_config(variant)
    changes = {"num_layers": 4, "window_size": (2, 0), "window_attn_skip_freq": [1, 1, 1, 1]}
    if variant.startswith("qwen"):
        changes["window_attn_skip_freq"] = [0, 1, 1, 0]
    if variant == "qwen3_moe_mixed":
        changes |= {"window_attn_skip_freq": None, "num_experts": 8, "moe_router_topk": 5}
        changes |= {"moe_layer_freq": [0, 1, 1, 1], "moe_router_pre_softmax": False}
    args = {**_args(seed), **changes}
    got = family_of(seed).hf_config(seed, Namespace(**args))
    again = _args(got)
    if again["window_attn_skip_freq"] is None:
        args["window_attn_skip_freq"] = None
    assert again == args


@pytest.mark.parametrize(
    ("variant", "changes", "named"),
    [
        ("mixtral", {"moe_layer_freq": [1, 0, 1]}, "mixtral config cannot say .*experts"),
        ("mixtral", {"moe_router_pre_softmax": True}, "mixtral config cannot say .*experts"),
        (
            "mistral",
            {"window_size": (3, 0), "window_attn_skip_freq": [1, 0, 1]},
            "mistral config cannot say .*windows",
        ),
        ("plain", {"window_size": (3, 0), "window_attn_skip_freq": None}, "sliding_window"),
        ("qwen3_types", {"window_size": (3, 3)}, "no causal window"),
        ("qwen3_moe", {"num_experts": None}, "no experts"),
        ("qwen2", {"add_qkv_bias": False}, "biases elsewhere"),
        ("qwen2", {"add_bias_linear": True}, "biases elsewhere"),
    ],
)
def test_what_a_config_cannot_say(variant: str, changes: dict[str, Any], named: str) -> None:
    config = toys.llama_config(variant)
    args = Namespace(**{**_args(config), **changes})
    with pytest.raises(ValueError, match=named):
        family_of(config).hf_config(config, args)


@pytest.mark.parametrize(
    ("variant", "changes", "named"),
    [
        ("mixtral", {"num_local_experts": None}, "num_local_experts"),
        ("qwen3_moe", {"num_local_experts": 5}, "num_experts.*one number"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise"),
        ("qwen3_moe", {"attention_bias": True}, "attention_bias"),
        ("mixtral", {"layer_types": ["full_attention"] * 3, "sliding_window": 4}, "layer_types"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 3}, "layer_types"),
        ("qwen3", {"layer_types": ["full_attention"] * 2}, "layer_types.*3 layers"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 3}, "layer_types"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size"),
        ("mistral", {"max_window_layers": 2}, "max_window_layers"),
        ("mistral", {"attention_bias": True}, "attention_bias"),
        ("qwen2", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "dynamic"),
        (
            "llama_yarn",
            {"rope_scaling": {**toys.YARN, "attention_factor": 1.2}},
            "attention_factor.*computes it",
        ),
        ("llama_yarn", {"rope_scaling": {**toys.YARN, "short_factor": [1.0]}}, "short_factor"),
        ("phi3", {"rope_scaling": {"type": "su", "short_factor": [1.0]}}, "LongRoPE.*fdd teach"),
        ("plain", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("glm4_moe", {"rope_scaling": toys.YARN}, "YaRN turns all"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers.*3 layers"),
        ("smollm3", {"no_rope_layers": [1, 0, 2]}, "no_rope_layers"),
        ("glm4_moe", {"norm_topk_prob": False}, "norm_topk_prob.*sigmoid"),
        ("glm4_moe", {"n_group": 4}, "n_group.*divide"),
        ("glm4_moe", {"n_group": 3, "topk_group": 2}, "topk_group.*best 2"),
        ("seed_oss", {"attention_out_bias": True}, "attention_out_bias"),
    ],
)
def test_configs_refused_by_name(variant: str, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        _args(toys.llama_config(variant, **changes))
