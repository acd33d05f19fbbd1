"""Access to a model's lens: its final norm and language-model head with their present weights.

Shape letters: H hidden, W this rank's slice of the vocabulary.
"""

from __future__ import annotations

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_fdd.losses.lens import FinalNorm, Lens


def read_lens(model: GPTModel, *, with_norm: bool, detached: bool) -> Lens:
    """Return the lens of a model that owns its head (the last pipeline stage), with its present weights.

    Args:
        model: an unwrapped GPTModel.
        detached: whether head and norm are constants of the step; else both receive the lens gradient.

    Collectives: none of its own. Under `--overlap-param-gather` it waits for the parameters that the
    output layer's bucket is still gathering, as a call of that layer would.
    """
    head_WH = read_head(model)
    norm = read_final_norm(model) if with_norm else None
    if not detached:
        return Lens(head_WH, norm)
    if norm is not None:
        bias_H = None if norm.bias_H is None else norm.bias_H.detach()
        norm = FinalNorm(norm.weight_H.detach(), bias_H, norm.epsilon, norm.kind)
    return Lens(head_WH.detach(), norm)


def read_head(model: GPTModel) -> Tensor:
    """Return the output weight [W, H] of this rank, tied or not, after its new value has arrived."""
    if model.share_embeddings_and_output_weights:
        if model.pre_process:
            wait_for(model.embedding.word_embeddings)
        else:
            wait_for(model.output_layer)
        return model.shared_embedding_or_output_weight()
    wait_for(model.output_layer)
    return model.output_layer.weight


def read_final_norm(model: GPTModel) -> FinalNorm:
    """Return the final norm's parameters, after their new values have arrived."""
    config, norm = model.config, model.decoder.final_layernorm
    wait_for(norm)
    weight_H = norm.weight + 1 if config.layernorm_zero_centered_gamma else norm.weight
    if config.normalization == "LayerNorm":
        return FinalNorm(weight_H, norm.bias, config.layernorm_epsilon, "layer")
    return FinalNorm(weight_H, None, config.layernorm_epsilon, "rms")


def wait_for(owner: torch.nn.Module) -> None:
    """Call the hook that DDP calls before a module's forward; it waits for parameters that are still being gathered.

    The fused losses never call the head's module, and read the norm's parameters outside its module. Without this
    call training would continue with stale values, and small models would not show it (docs/gradients.md).
    """
    for hook in owner._forward_pre_hooks.values():
        hook(owner, ())
