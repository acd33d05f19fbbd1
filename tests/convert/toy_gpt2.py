"""Tiny GPT-2 models that the tests make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.convert import toys

SHAPE: dict[str, Any] = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 99,
    "n_positions": 64,
    "n_ctx": 64,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 4,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 3e-4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "summary_type": "cls_index",
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "torch_dtype": "float32",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tanh": {"activation_function": "gelu_pytorch_tanh"},
    "erf": {"activation_function": "gelu"},
    "untied": {"tie_word_embeddings": False},
    "inner": {"n_inner": 66, "reorder_and_upcast_attn": True},
    "bfloat16": {"torch_dtype": "bfloat16"},
}


def config(variant: str = "plain", **changes: Any) -> dict[str, Any]:
    """Return the config.json of a variant."""
    return {**SHAPE, **VARIANTS[variant], **changes}


def make_gpt2(folder: Path, variant: str = "plain", **changes: Any) -> Path:
    """Make a model folder in which all weights are random (norms and biases too), with transformers' own module."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True)
    fields = config(variant, **changes)
    toys.write_json(folder / "config.json", fields)
    toys.write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    dtype = getattr(torch, fields["torch_dtype"])
    tensors = {
        name: (torch.randn(value.shape) * 0.3 + 1.0 * (".ln_" in name and "weight" in name)).to(dtype)
        for name, value in model.state_dict().items()
    }
    if fields.get("tie_word_embeddings", True):
        tensors.pop("lm_head.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    toys.make_tokenizer(folder)
    return folder


def strip_prefix(folder: Path) -> dict[str, str]:
    """Rewrite the file like the hub's gpt2: no `transformer.`, and masks as buffers. Return the old hashes."""
    from safetensors.torch import load_file

    hashes = toys.tensor_hashes(folder)
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    for layer in range(SHAPE["n_layer"]):
        bare[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.uint8).tril()
        bare[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    return hashes
