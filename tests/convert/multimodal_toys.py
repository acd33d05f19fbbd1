"""Tiny models of text and images, made and computed by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.convert import toys

_VISION: dict[str, dict[str, Any]] = {
    "mistral3": {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
        "image_size": 8,
        "patch_size": 4,
    },
    "gemma3": {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    },
    "llama4": {
        "model_type": "llama4_vision_model",
        "hidden_size": 16,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "vision_output_dim": 12,
        "projector_input_dim": 12,
        "projector_output_dim": 12,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    },
}
_ARCHITECTURES = {
    "mistral3": "Mistral3ForConditionalGeneration",
    "gemma3": "Gemma3ForConditionalGeneration",
    "llama4": "Llama4ForConditionalGeneration",
}
# Name -> model type and the variant of its text part.
MODELS = {
    "mistral3": ("mistral3", "mistral"),
    "mistral3 of ministral3": ("mistral3", "ministral3"),
    "gemma3": ("gemma3", "gemma3_text"),
    "llama4": ("llama4", "llama4_text"),
}
_OF_THE_WHOLE = ("architectures", "torch_dtype", "tie_word_embeddings", "bos_token_id", "eos_token_id")
FIRST_IMAGE_TOKEN = 96


def multimodal_config(name: str, **changes: Any) -> dict[str, Any]:
    """Return the config.json of a model; `changes` are of the whole, and a field at `...` is absent."""
    model_type, variant = MODELS[name]
    text = {key: value for key, value in toys.llama_config(variant).items() if key not in _OF_THE_WHOLE}
    config = {
        "model_type": model_type,
        "architectures": [_ARCHITECTURES[model_type]],
        "text_config": text,
        "vision_config": _VISION[model_type],
        "image_token_index": FIRST_IMAGE_TOKEN + 2,
        "torch_dtype": "float32",
        **(
            {"mm_tokens_per_image": 4, "boi_token_index": FIRST_IMAGE_TOKEN} if model_type == "gemma3" else {}
        ),
        **changes,
    }
    return {field: value for field, value in config.items() if value is not ...}


def make_multimodal(folder: Path, name: str, *, is_published: bool = True, **changes: Any) -> Path:
    """Make a model folder in which all weights are random.

    Args:
        is_published: whether tensors have the published names, and not those of transformers 5 in memory.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    folder.mkdir(parents=True)
    config = multimodal_config(name, **changes)
    toys.write_json(folder / "config.json", config)
    torch.manual_seed(7)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    for key, parameter in model.named_parameters():
        one = 0.0 if config["model_type"] == "gemma3" else 1.0  # its norms scale by 1 + weight
        parameter.data = torch.randn(parameter.shape) * 0.15 + one * ("norm" in key)
    model.save_pretrained(folder, save_original_format=is_published)
    toys.write_json(folder / "config.json", config)
    toys.write_json(folder / "preprocessor_config.json", {"image_processor_type": "PixtralImageProcessor"})
    toys.make_tokenizer(folder)
    return folder


def multimodal_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Return what transformers' class for text and images makes of text alone, in float32, with eager attention."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return model(input_ids=tokens).logits
