"""Tiny models and tokenizers that the tests make, and the values that the conversion tests compare."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from tests.convert import own_layers
from tests.convert.own_layers import LLAMA3_SCALING, YARN

# Six divides all sizes that 1, 2 and 3 ranks share; head_dim is not hidden / heads, and the vocabulary is odd.
SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 66,
    "num_hidden_layers": 3,
    "num_attention_heads": 12,
    "num_key_value_heads": 6,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "rms_norm_eps": 3e-4,
    "tie_word_embeddings": False,
    "rope_theta": 500000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
TOKENS = torch.randint(0, SHAPE["vocab_size"], (2, 40), generator=torch.Generator().manual_seed(1))
# Rounding of float32 logits of size 1 through three layers; a wrong rope factor causes an error 100 times as large.
LOGIT_TOLERANCE = 3e-5  # 1.0e-5 was measured on one kind of processor
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "llama3": {"rope_scaling": LLAMA3_SCALING},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "ungrouped": {"num_key_value_heads": 12, "head_dim": 4},
    "bfloat16": {"torch_dtype": "bfloat16"},
    "float16": {"torch_dtype": "float16"},
    "mistral": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None},
    # The windows are shorter than the texts.
    "mistral_window": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 7},
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    "qwen2_window": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 2,
    },
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "max_window_layers": 3},
    "qwen3_types": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "qwen3_bias": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "attention_bias": True},
    "mixtral": {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "intermediate_size": 64,  # transformers multiplies all experts at once, in multiples of 16 bytes
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.02,
    },
    "mixtral_window": {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "intermediate_size": 64,
        "num_local_experts": 4,
        "sliding_window": 6,
        "torch_dtype": "bfloat16",
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "max_window_layers": 3,
    },
    # This variant has one dense layer, and the weights of a token's experts do not sum to 1.
    "qwen3_moe_mixed": {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": False,
        "mlp_only_layers": [1],
        "use_sliding_window": True,
        "sliding_window": 8,
    },
    "olmo2": {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"]},
    # The width in the scale of attention is not the head's, and layers with a window have their own rotary base.
    "gemma3_text": {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 13,
        "sliding_window": 7,
        "sliding_window_pattern": 3,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "cache_implementation": "hybrid",
    },
}
VARIANTS |= {
    "llama_yarn": {"rope_scaling": {**YARN, "attention_factor": 0.1 * math.log(4.0) + 1.0}},
    "qwen3_yarn": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "max_window_layers": 3,
        "rope_scaling": {
            **YARN,
            "beta_fast": 8.0,
            "beta_slow": 2.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
            "truncate": False,
        },
    },
    "qwen2_linear": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "rope_scaling": {"type": "linear", "factor": 8.0},
    },
    "seed_oss": {
        "model_type": "seed_oss",
        "architectures": ["SeedOssForCausalLM"],
        "attention_out_bias": False,
    },
    "smollm3": {
        "model_type": "smollm3",
        "architectures": ["SmolLM3ForCausalLM"],
        "head_dim": 4,
        "pad_token_id": 0,
        "no_rope_layer_interval": 2,
        "tie_word_embeddings": True,
    },
    "ernie4_5": {"model_type": "ernie4_5", "architectures": ["Ernie4_5ForCausalLM"], "use_bias": False},
    "phi3": {
        "model_type": "phi3",
        "architectures": ["Phi3ForCausalLM"],
        "pad_token_id": 0,
        "partial_rotary_factor": 0.6,
        "original_max_position_embeddings": 64,
        "sliding_window": 7,
    },
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "architectures": ["Qwen2MoeForCausalLM"],
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 48,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [],
    },
    # Its first layer is dense; experts are chosen by a bias in float32.
    "glm4_moe": {
        "model_type": "glm4_moe",
        "architectures": ["Glm4MoeForCausalLM"],
        "attention_bias": True,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.4,
        "n_routed_experts": 6,
        "num_experts_per_tok": 3,
        "n_shared_experts": 2,
        "moe_intermediate_size": 24,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 1,
        "torch_dtype": "bfloat16",
    },
}
VARIANTS["gpt_oss"] = {
    "model_type": "gpt_oss",
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "intermediate_size": 64,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 7,
    "rope_theta": 150000,
    "rope_scaling": {**YARN, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
    "swiglu_limit": 7.0,
    "pad_token_id": 0,
    "experts_per_token": 2,
    "initial_context_length": 16,
}
VARIANTS |= {
    "nemotron": {
        "model_type": "nemotron",
        "architectures": ["NemotronForCausalLM"],
        "hidden_act": "relu2",
        "norm_eps": 3e-4,
        "rms_norm_eps": ...,
        "partial_rotary_factor": 0.6,
    },
    "starcoder2": {
        "model_type": "starcoder2",
        "architectures": ["Starcoder2ForCausalLM"],
        "hidden_act": "gelu_pytorch_tanh",
        "norm_epsilon": 3e-4,
        "rope_theta": 999999.4420358813,
        "rms_norm_eps": ...,
        "use_bias": True,
        "sliding_window": 7,
        "head_dim": ...,
        "tie_word_embeddings": True,
    },
}
_LATENT: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 6,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 6,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}
VARIANTS |= {
    # Its norms inside attention have another epsilon than the others.
    "deepseek_v3": {**_LATENT, "torch_dtype": "bfloat16"},
    "deepseek_v3_yarn": {
        **_LATENT,
        "rope_interleave": True,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 8.0,
            "beta_slow": 2.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
        },
    },
    "deepseek_v3_dense": {**_LATENT, "first_k_dense_replace": 3},
    # Moonlight and Kanana have no latent of queries.
    "deepseek_v3_short": {**_LATENT, "q_lora_rank": None, "n_group": 1, "topk_group": 1},
    "deepseek_v2": {
        **_LATENT,
        "model_type": "deepseek_v2",
        "architectures": ["DeepseekV2ForCausalLM"],
        "q_lora_rank": None,
        "n_shared_experts": 2,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
    },
}
LATENT = ("deepseek_v3", "deepseek_v3_yarn", "deepseek_v2")
VARIANTS |= own_layers.VARIANTS
MIXTURES = (
    *("mixtral", "mixtral_window", "qwen3_moe", "qwen3_moe_mixed", "qwen2_moe", "glm4_moe", *LATENT),
    *("gpt_oss", "olmoe", "minimax_m2", "granitemoe", "ernie4_5_moe", "llama4_text"),
)


def llama_config(variant: str = "plain", **changes: Any) -> dict[str, Any]:
    """Return the config.json of a variant; a field at `...` is absent."""
    config = {**SHAPE, **VARIANTS[variant], **changes}
    return {field: value for field, value in config.items() if value is not ...}


def write_json(path: Path, value: Any) -> None:
    """Write one JSON file."""
    path.write_text(json.dumps(value, indent=2))


def make_llama(folder: Path, variant: str = "plain", *, tokenizer: bool = True, **changes: Any) -> Path:
    """Make a model folder in which all weights are random (norms and biases too), with transformers' own module."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True)
    config = llama_config(variant, **changes)
    write_json(folder / "config.json", config)
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    one = 0.0 if config["model_type"].startswith("gemma") else 1.0  # its norms scale by 1 + weight
    for name, parameter in model.named_parameters():
        parameter.data = torch.randn(parameter.shape) * 0.15 + one * ("norm" in name)
    biases = {
        name: torch.randn(buffer.shape, dtype=torch.float32) * 0.15
        for name, buffer in model.named_buffers()
        if name.endswith("e_score_correction_bias")
    }
    model.to(getattr(torch, config["torch_dtype"]))
    for name, bias in biases.items():  # published files keep them in float32
        model.get_buffer(name).data = bias
    model.save_pretrained(folder)
    write_json(folder / "config.json", config)  # the original, without what transformers adds
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "temperature": 0.6})
    if tokenizer:
        make_tokenizer(folder)
    return folder


def make_tokenizer(folder: Path, added: tuple[str, ...] = ("<|chat|>",), vocab_size: int = 90) -> None:
    """Make a byte-pair tokenizer, trained on a few lines, in the files that transformers reads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    lines = [
        "the quick brown fox jumps over the lazy dog",
        "a student follows its teacher",
        "gradient descent",
    ]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<unk>", "<s>", "</s>"])
    tokenizer.train_from_iterator(lines * 4, trainer)
    tokenizer.add_special_tokens(list(added))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    write_json(folder / "tokenizer_config.json", {**settings, "unk_token": "<unk>"})
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")


def join_experts(source: Path, folder: Path, *, transposed: bool) -> Path:
    """Write a model as it stands in transformers' memory: all experts of a layer in two tensors."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    tensors = {}
    for name, value in model.state_dict().items():
        turned = transposed and value.ndim == 3
        tensors[name] = (value.transpose(1, 2) if turned else value).contiguous().clone()
    assert any(name.endswith("experts.gate_up_proj") for name in tensors)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def tensor_hashes(folder: Path) -> dict[str, str]:
    """Return dtype, shape and SHA-256 of the bytes of every tensor in a folder's safetensors files."""
    hashes = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                value = file.get_tensor(name)
                raw = value.contiguous().view(torch.uint8).numpy().tobytes()
                assert name not in hashes
                hashes[name] = f"{value.dtype} {list(value.shape)} {hashlib.sha256(raw).hexdigest()}"
    return hashes


def hf_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Return transformers' logits in float32, with eager attention."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(tokens).logits


def read_json(path: Path) -> Any:
    """Read one JSON file."""
    return json.loads(path.read_text())
