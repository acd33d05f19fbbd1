"""The configs of published models: understood, and of the size that they are said to have."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_fdd.convert.families import family_of
from megatron_fdd.convert.mcore_model import build_model, complete_args
from megatron_fdd.convert.ranks import conversion_ranks
from tests.ranks import Layout, run_on_ranks

_SAME = {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02, "torch_dtype": "bfloat16"}
_SAME |= {"transformers_version": "4.51.0", "use_cache": True, "tie_word_embeddings": False}
_DECODER = {**_SAME, "hidden_act": "silu", "attention_dropout": 0.0, "rms_norm_eps": 1e-6}
# The fields that the published models' configs have.
PUBLISHED = {
    "Llama-3.2-1B": {
        **_DECODER, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": False,
        "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 131072,
        "mlp_bias": False, "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rope_theta": 500000.0, "vocab_size": 128256,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    },
    "Mistral-7B-v0.1": {
        **_DECODER, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "hidden_size": 4096,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rope_theta": 10000.0, "sliding_window": 4096,
        "vocab_size": 32000,
    },
    "Qwen2.5-7B": {
        **_DECODER, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 3584,
        "intermediate_size": 18944, "max_position_embeddings": 131072, "max_window_layers": 28,
        "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "rope_theta": 1000000.0,
        "sliding_window": 131072, "use_mrope": False, "use_sliding_window": False, "vocab_size": 152064,
    },
    "Qwen3-1.7B": {
        **_DECODER, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "attention_bias": False,
        "head_dim": 128, "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960,
        "max_window_layers": 28, "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
        "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "Mixtral-8x7B-v0.1": {
        **_DECODER, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_size": 4096,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
        "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "output_router_logits": False, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02,
        "sliding_window": None, "vocab_size": 32000,
    },
    "Qwen3-30B-A3B": {
        **_DECODER, "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False,
        "decoder_sparse_step": 1, "head_dim": 128, "hidden_size": 2048, "intermediate_size": 6144,
        "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
        "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
        "output_router_logits": False, "rope_scaling": None, "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001, "sliding_window": None, "use_sliding_window": False, "vocab_size": 151936,
    },
    "gpt2-xl": {
        **_SAME, "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new",
        "attn_pdrop": 0.1, "embd_pdrop": 0.1, "layer_norm_epsilon": 1e-05, "n_ctx": 1024, "n_embd": 1600,
        "n_head": 25, "n_layer": 48, "n_positions": 1024, "output_past": True, "resid_pdrop": 0.1,
        "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
        "summary_type": "cls_index", "summary_use_proj": True, "tie_word_embeddings": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": 50257,
    },
}  # fmt: skip


def _count_parameters(config: dict[str, Any]) -> int:
    """Body on a rank: elements that the table exports, and that Megatron agrees on the names."""
    family = family_of(config)
    architecture = family.megatron_args(config)
    with conversion_ranks() as groups:
        args = complete_args({**family.fixed, **architecture}, dtype=torch.bfloat16, vocabulary_divisor=128)
        parameters = dict(build_model(args, groups, "meta").named_parameters())
    rows = family.rows(config)
    assert {row.mcore for row in rows} == set(parameters)
    padding = args.padded_vocab_size - architecture["vocab_size"]
    padded = sum(padding * parameters[row.mcore].shape[1] for row in rows if row.vocabulary)
    return sum(parameters[row.mcore].numel() for row in rows if row.sources) - padded


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("Llama-3.2-1B", 1498.5),  # 1,236 with its tied embeddings, which this config unties
        ("Mistral-7B-v0.1", 7241.7),
        ("Qwen2.5-7B", 7615.6),
        ("Qwen3-1.7B", 2031.7),  # 1,721 tied
        ("Mixtral-8x7B-v0.1", 46702.8),
        ("Qwen3-30B-A3B", 30532.1),
        ("gpt2-xl", 1557.6),
    ],
)
def test_published_models(name: str, millions: float) -> None:
    """Their configs are understood, and the tables hold as many parameters as they are said to have."""
    [count] = run_on_ranks(_count_parameters, Layout(ranks=1), {"config": PUBLISHED[name]})
    assert count / 1e6 == pytest.approx(millions, abs=0.1)
