"""Loading of a checkpoint's weights into a stock model, at any layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_fdd.host.checkpoint import EXTRA_STATE
from megatron_fdd.host.damage import DAMAGE, cause_of
from megatron_fdd.host.listing import listing
from megatron_fdd.host.weight_names import other_name, use_stored_names, weights_only


def load_weights(
    model: MegatronModule, path: Path, flag: str, groups: ProcessGroupCollection, *, with_scales: bool = False
) -> dict[str, Tensor]:
    """Fill a stock model from a checkpoint saved at any layout; optimizer and random state are not read.

    Every weight of the checkpoint must be used and every weight of the model filled. A weight that the model holds in
    FP8 is read into host memory as a whole and rounded on its way to the device, because a scale belongs to a whole
    tensor. This takes 2 bytes of host memory for each weight, and 4 for the first matrix of a gated feed-forward layer,
    whose halves are joined.

    Args:
        with_scales: also read the extra state of TransformerEngine's modules, if the checkpoint has it. It is
            pickled, and TransformerEngine refuses it unless it has been told to trust it.

    Returns:
        This rank's weights as they were read, by their names in the model.

    Collectives: those of `dist_checkpointing.load` over all ranks.

    Raises:
        ValueError: model and checkpoint differ (lists the weights), or the files are damaged. The same on every rank.
    """
    metadata = dist_checkpointing.load_content_metadata(str(path)) or {}
    sharded = model.sharded_state_dict(metadata={**metadata, "dp_cp_group": groups.dp_cp})
    if not with_scales:
        sharded = {key: entry for key, entry in sharded.items() if EXTRA_STATE not in key}
    for entry in sharded.values():
        if is_float8tensor(entry.data):
            entry.data = torch.empty(entry.data.shape, dtype=entry.data.dtype, device="cpu")
    try:
        stored = dist_checkpointing.load_tensors_metadata(str(path))
        use_stored_names(sharded, stored)
        state, missing, unexpected = dist_checkpointing.load(
            {"model": sharded}, str(path), strict="return_all"
        )
    except DAMAGE as error:
        raise ValueError(
            f"{flag} {path}: its weights are not those that its own arguments describe, or are damaged "
            f"({cause_of(error)}); convert or copy it again"
        ) from error
    # Weights that no rank asked for; a weight that was read under its other name is not lost.
    used = set(stored) - set(missing)
    unused, unfilled = (
        weights_only(key for key in missing if other_name(key) not in used),
        weights_only(unexpected),
    )
    if unused or unfilled:
        raise ValueError(
            f"{flag} {path}: the checkpoint and the model that its own arguments describe differ. "
            f"In the checkpoint but not used: {listing(unused)}. In the model but not filled: {listing(unfilled)}. "
            "Layers of a specification of your own need a registered family (docs/extend/family.md)"
        )
    weights = {key: value for key, value in state["model"].items() if EXTRA_STATE not in key}
    if with_scales:  # first, because weights in FP8 are rounded with them
        _load_scales(model, {key: value for key, value in state["model"].items() if key not in weights})
    # The extra state of TransformerEngine's modules is in no checkpoint of other modules.
    result = model.load_state_dict(weights, strict=False)
    left = weights_only([*result.missing_keys, *result.unexpected_keys])
    assert not left, f"checked above: {left}"
    return weights


def _load_scales(model: MegatronModule, scales: Mapping[str, object]) -> None:
    """Load the extra state of TransformerEngine's modules.

    A module whose weights are in FP8 would take its state before Megatron has joined that of the module's experts.
    """
    modules = [module for module in model.modules() if getattr(module, "primary_weights_in_fp8", False)]
    for module in modules:
        module.primary_weights_in_fp8 = False
    model.load_state_dict(scales, strict=False)
    for module in modules:
        module.primary_weights_in_fp8 = True
