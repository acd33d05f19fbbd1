"""The scales of a teacher in FP8 with delayed scaling: taken from its checkpoint and then frozen.

TransformerEngine finds such scales in training and keeps them in a module's extra state. Megatron stores this state
once for all tensor-parallel ranks: the largest values are reduced over them, so that a scale belongs to the whole
tensor and is right at any tensor-parallel size. That is not true for expert-parallel sizes (`check_expert_scales`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import Module

from megatron_fdd.host.listing import listing

# Under this key TransformerEngine notes to which sets of scales, forward and backward, a module's scales belong; the
# end of an FP8 context updates these sets. The value here names sets that do not exist.
_REGISTERED, _NOWHERE = "buffer_index_and_autocast_key", [0, "frozen", 0, "frozen"]


def freeze_scales(model: Module, checkpoint: Path) -> None:
    """Protect the loaded scales from updates by the student's FP8 contexts.

    Without gradients TransformerEngine updates nothing at the end of the teacher's own context, but it adds the
    teacher's scales to the ones that it updates at the end of a student's context.

    Collectives: one all-gather of names over all ranks.

    Raises:
        ValueError: a layer has no scales; raised on every rank.
    """
    unscaled = [name for name, module in fp8_linears(model) if not _has_scales(module)]
    found: list[list[str]] = [[]] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, unscaled)
    names = sorted({name for names in found for name in names})
    if names:
        raise ValueError(
            f"--teacher-load {checkpoint}: no scales of delayed scaling for {listing(names)}; "
            "use --teacher-fp8-recipe tensorwise, blockwise or mxfp8"
        )
    for module in model.modules():
        if isinstance(meta := getattr(module, "fp8_meta", None), dict):
            meta[_REGISTERED] = _NOWHERE
    for _, module in fp8_linears(model):
        for quantizer in module.quantizers["scaling_fwd"]:
            quantizer.amax = torch.zeros_like(quantizer.amax)  # it was the newest row of the history


def fp8_linears(model: Module) -> Iterator[tuple[str, Any]]:
    """Yield TransformerEngine's modules that multiply with weights; attention has FP8 state too, but no weights."""
    for name, module in model.named_modules():
        weights = any(key.startswith("weight") for key, _ in module.named_parameters(recurse=False))
        if weights and hasattr(module, "fp8_meta"):
            yield name, module


def _has_scales(module: Any) -> bool:
    """Whether any scale of a module differs from its initial value; an expert that never saw a token keeps some."""
    scale = getattr(module.fp8_meta.get("scaling_fwd"), "scale", None)
    return scale is not None and bool((scale != 1).any())
