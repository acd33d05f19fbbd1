"""Stored arguments that no table of kinds covers and that are read all the same: each must be like its flag."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from megatron.core.transformer.transformer_config import MLATransformerConfig

from megatron_fdd.host.field_kinds import FLAG, Kind, shown

# What Megatron 0.19.2 reads of a checkpoint's arguments when it loads it: `load_args_from_checkpoint`,
# `load_checkpoint`, `check_checkpoint_args`.
READ_TO_LOAD = frozenset(
    """
    add_bias_linear add_position_embedding add_qkv_bias apply_layernorm_1p apply_query_key_layer_scaling
    attention_dropout ckpt_format ckpt_fully_parallel_save consumed_train_samples consumed_valid_samples
    data_parallel_random_init data_parallel_size disable_bias_linear expert_model_parallel_size ffn_hidden_size
    global_batch_size group_query_attention heterogeneous_layers_config_encoded_json heterogeneous_layers_config_path
    hidden_dropout hidden_size hybrid_layer_pattern hybrid_override_pattern kv_channels make_vocab_size_divisible_by
    mamba_head_dim mamba_num_groups mamba_num_heads mamba_state_dim max_position_embeddings model_parallel_size
    moe_ffn_hidden_size moe_grouped_gemm moe_latent_size moe_layer_freq moe_router_enable_expert_bias
    moe_router_pre_softmax moe_router_score_function moe_router_topk moe_router_topk_scaling_factor
    moe_shared_expert_intermediate_size moe_single_grouped_bias moe_single_grouped_weight moe_token_dispatcher_type
    mtp_hybrid_override_pattern mtp_num_layers mtp_use_repeated_layer no_save_optim no_save_rng normalization
    num_attention_heads num_experts num_layers num_layers_per_virtual_pipeline_stage num_query_groups
    padded_vocab_size pipeline_model_parallel_size position_embedding_type rotary_base rotary_interleaved
    rotary_percent seq_length skipped_train_samples spec squared_relu swiglu tensor_model_parallel_size
    tiktoken_pattern tokenizer_model tokenizer_type untie_embeddings_and_output_weights use_rotary_position_embeddings
    virtual_pipeline_model_parallel_size world_size
    """.split()
)
# What it reads of a model's arguments to build it: the fields of its configuration, and what `gpt_config_from_args`,
# `core_transformer_config_from_args` and `_apply_yarn_config_from_args` name beside them.
READ_TO_BUILD = frozenset(field.name for field in dataclasses.fields(MLATransformerConfig)) | frozenset(
    """
    bias_gelu_fusion bias_swiglu_fusion decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers
    fp16_lm_cross_entropy fp4_param_gather fp8_param_gather group_query_attention heterogeneous_layers_config_path
    hybrid_layer_pattern init_method_xavier_uniform kitchen_config_file kitchen_recipe_number
    make_vocab_size_divisible_by max_position_embeddings no_persist_layer_norm num_experts padded_vocab_size
    position_embedding_type quick_geglu rotary_seq_len_interpolation_factor seed spec squared_relu swiglu
    te_precision_config_file untie_embeddings_and_output_weights use_rope_scaling vocab_size yaml_cfg yarn_beta_fast
    yarn_beta_slow yarn_correction_range_round_to_int yarn_original_max_position_embeddings
    """.split()
)
# What this package reads of any checkpoint, beside the fields of `model_fields`.
READ_HERE = frozenset({"expert_model_parallel_size", "fdd_layers", "fdd_layer_rule", "fdd_layer_pairs"})
_NUMBER_LIKE = Kind("a number", lambda value: type(value) in (int, float))
# By the type of a flag's default. A text may stand for one of a set of things, which Megatron stores as that thing.
_LIKE: Mapping[type, Kind] = {
    bool: FLAG,
    int: _NUMBER_LIKE,
    float: _NUMBER_LIKE,
    str: Kind("a text", lambda value: not isinstance(value, bool | int | float | dict)),
}


def check_like_flags(
    args: argparse.Namespace, defaults: Mapping[str, Any], where: str, names: Collection[str]
) -> None:
    """Refuse stored arguments of another type than the flag of the same name has.

    Only what cannot be meant is refused: a number for a switch, a switch for a number or a text, an object for any.
    Lists are left alone.

    Args:
        defaults: the parser's default of every flag.
        where: the flag and the folder of the checkpoint, for the message.
        names: the arguments that are read of this checkpoint; others may be anything.

    Raises:
        ValueError: names the argument, its value and what the flag takes.
    """
    for name, value in vars(args).items():
        allowed = _LIKE.get(type(defaults.get(name))) if name in names else None
        if allowed is not None and not (
            value is None or isinstance(value, list | tuple) or allowed.fits(value)
        ):
            raise ValueError(
                f"{where}: stores {name} = {shown(value)}, which must be {allowed.words}: the copy is damaged, or "
                "another program wrote it"
            )
