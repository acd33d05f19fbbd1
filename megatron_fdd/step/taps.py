"""One forward pass of a stock GPTModel that also gives the outputs of some of its layers."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from megatron_fdd.data.batch import Batch


def forward_with_taps(
    model: torch.nn.Module,
    batch: Batch,
    layers: Collection[int],
    output_processor: Callable[..., Tensor | tuple[Tensor, list[Tensor]]],
) -> tuple[Tensor, list[Tensor]]:
    """Run a micro-batch through this stage's part of a model.

    Shape letters: S sequence (this rank's part), B micro-batch, H the model's width.

    Args:
        model: a GPTModel, wrapped or not.
        layers: the layers whose outputs are taken, 0-based in the whole model; layers of other stages give nothing.
        output_processor: GPTModel's; on the last stage it gets the hidden states, together with any taps
            (`hidden_and_taps`), and returns the result that replaces logits.

    Returns:
        The processor's result, or on other stages hidden states [S, B, H]; and taps [S, B, H] in depth order, unless
        the processor has used them.

    Collectives: those of the model's own forward pass.
    """
    output: Any = model(
        batch.tokens_BS,
        batch.position_ids_BS,
        batch.attention_mask,
        packed_seq_params=batch.packed,
        extra_block_kwargs={"extract_layer_indices": set(layers)},
        output_processor=output_processor,
    )
    return hidden_and_taps(output)


def hidden_and_taps(output: Tensor | tuple[Tensor, list[Tensor]]) -> tuple[Tensor, list[Tensor]]:
    """Split the decoder's output: it is a pair only if taps were asked for."""
    return output if isinstance(output, tuple) else (output, [])


def stop_before_head(
    *, hidden_states: Tensor | tuple[Tensor, list[Tensor]], **_: object
) -> Tensor | tuple[Tensor, list[Tensor]]:
    """Return the decoder's output, as `output_processor` of a GPTModel whose logits are never formed."""
    return hidden_states
