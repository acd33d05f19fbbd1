"""One micro-batch on the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# B micro-batch, S sequence


@dataclass(frozen=True, slots=True)
class Batch:
    """What every stage and every tensor-parallel rank reads for itself.

    Attributes:
        tokens_BS, labels_BS, position_ids_BS: int64.
        loss_mask_BS: float32, 1 where the label counts.
        token_mask_BS: float32, 1 where the input is a token and no padding (`--fdd-tokens all`).
        attention_mask: None for causal attention; bool [B, 1, S, S], true where attention is forbidden, with
            `--reset-attention-mask`.
    """

    tokens_BS: Tensor
    labels_BS: Tensor
    position_ids_BS: Tensor
    loss_mask_BS: Tensor
    token_mask_BS: Tensor
    attention_mask: Tensor | None = None


def get_batch(data_iterator: Iterator[Mapping[str, Tensor]], device: torch.device | str | int) -> Batch:
    """Take the next micro-batch to `device`.

    The iterator's dict is left as it is: Megatron may hand the same one out again (it re-runs steps).
    Collectives: none.
    """
    sample = next(data_iterator)

    def to_device(name: str) -> Tensor:
        return sample[name].to(device, non_blocking=True)

    return Batch(
        tokens_BS=to_device("tokens"),
        labels_BS=to_device("labels"),
        position_ids_BS=to_device("position_ids"),
        loss_mask_BS=to_device("loss_mask"),
        token_mask_BS=to_device("token_mask"),
        attention_mask=to_device("attention_mask") if "attention_mask" in sample else None,
    )
