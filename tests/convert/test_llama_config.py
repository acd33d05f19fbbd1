"""Conversion between config.json and Megatron args of the Llama family: both spellings, both ways, and all refusals."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest

from megatron_fdd.convert.families import family_of
from tests.convert import toys


def _args(config: dict[str, Any]) -> dict[str, Any]:
    return family_of(config).megatron_args(config)


@pytest.mark.parametrize("variant", list(toys.VARIANTS))
def test_the_way_back_leaves_the_config_alone(variant: str) -> None:
    config = toys.llama_config(variant)
    assert family_of(config).hf_config(config, Namespace(**_args(config))) == config


def test_new_and_old_rope_fields_mean_the_same() -> None:
    old = toys.llama_config("llama3")
    new = {key: value for key, value in old.items() if key not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = {"rope_theta": old["rope_theta"], **toys.LLAMA3_SCALING}
    assert _args(new) == _args(old)
    assert (_args(old)["rotary_base"], _args(old)["rope_scaling_factor"]) == (500000, 32.0)
    assert _args(toys.llama_config(rope_scaling=None))["use_rope_scaling"] is False


@pytest.mark.parametrize("spelling", ["old", "new"])
def test_another_model_in_the_seed_is_overwritten(spelling: str) -> None:
    target = toys.llama_config("llama3", num_hidden_layers=5, vocab_size=77, tie_word_embeddings=True)
    seed = toys.llama_config(pad_token_id=3)
    if spelling == "new":
        seed["rope_parameters"] = {"rope_theta": seed.pop("rope_theta"), "rope_type": "default"}
    got = family_of(seed).hf_config(seed, Namespace(**_args(target)))
    assert _args(got) == _args(target)
    assert got["pad_token_id"] == 3
    assert ("rope_parameters" in got) == (spelling == "new")


def test_vocabulary_size_of_the_seed_where_megatron_kept_none() -> None:
    config = toys.llama_config()
    args = Namespace(**{**_args(config), "vocab_size": None})
    assert family_of(config).hf_config(config, args) == config


def test_absent_fields_have_the_values_of_transformers() -> None:
    bare = {key: value for key, value in toys.SHAPE.items() if key not in ("head_dim", "num_key_value_heads")}
    args = _args(bare)
    assert (args["kv_channels"], args["num_query_groups"], args["group_query_attention"]) == (4, 12, False)
    assert (args["add_bias_linear"], args["attention_dropout"]) == (False, 0.0)


REFUSED = {
    "model_type": {"model_type": "gpt_bigcode"},
    "architectures": {"architectures": ["LlamaForSequenceClassification"]},
    "hidden_act": {"hidden_act": "gelu"},
    "pretraining_tp": {"pretraining_tp": 2},
    "partial_rotary_factor": {"partial_rotary_factor": 0.5},
    'partial_rotary_factor": 0.25': {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}},
    "rope_interleaved": {"rope_interleaved": True},
    "quantization_config": {"quantization_config": {"bits": 4}},
    "layer_types": {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "sliding_window": {"sliding_window": 4096},
    "use_sliding_window": {"use_sliding_window": True},
    "attention_bias": {
        "model_type": "mistral",
        "architectures": None,
        "sliding_window": None,
        "attention_bias": True,
    },
    "num_key_value_heads": {"num_key_value_heads": 5},
    "rope_type": {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    "ntk": {"rope_scaling": {"type": "ntk", "factor": 2.0}},
    "low_freq_factor": {"rope_scaling": {**toys.LLAMA3_SCALING, "low_freq_factor": 2.0}},
    "high_freq_factor": {"rope_scaling": {**toys.LLAMA3_SCALING, "high_freq_factor": 8.0}},
    "original_max_position_embeddings": {
        "rope_scaling": {**toys.LLAMA3_SCALING, "original_max_position_embeddings": 4096}
    },
    "attention_factor": {"rope_scaling": {**toys.LLAMA3_SCALING, "attention_factor": 2.0}},
    "but no factor": {"rope_scaling": {"rope_type": "llama3"}},
    "which rope type 'default' has no use for": {"rope_scaling": {"rope_type": "default", "factor": 2.0}},
    "but no high_freq_factor, original_max": {
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    },
    "rope_scaling": {"rope_scaling": toys.LLAMA3_SCALING, "rope_parameters": {"rope_theta": 1e4}},
    "residual_multiplier": {"residual_multiplier": 0.22},
    '"hidden_size": None, which must be a whole number': {"hidden_size": None},
}


@pytest.mark.parametrize("named", list(REFUSED))
def test_what_changes_the_function_is_refused_by_name(named: str) -> None:
    with pytest.raises(ValueError, match=named):
        _args(toys.llama_config(**REFUSED[named]))


def test_biases_on_query_key_and_value_alone_are_refused() -> None:
    config = toys.llama_config()
    args = Namespace(**{**_args(config), "add_qkv_bias": True})
    with pytest.raises(ValueError, match="query, key and value"):
        family_of(config).hf_config(config, args)
