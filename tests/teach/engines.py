"""Engines `transformers` of tiny models, and plain runs to compare them with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.tiny_teachers import LAYERS, VOCABULARY, WIDTH
from megatron_fdd.data.store.coverage import Ids
from megatron_fdd.data.store.identity import StoreIdentity, TapForm
from megatron_fdd.data.store.lens import StoredLens
from megatron_fdd.losses.lens import FinalNorm
from megatron_fdd.ops.head_extras import HeadExtras
from megatron_fdd.step.teacher.tap_format import TapFormat
from megatron_fdd.teach.hf_parts import Parts
from megatron_fdd.teach.hf_teacher import DTYPES
from megatron_fdd.teach.transformers import TransformersEngine

LENGTHS = (11, 5, 3, 11)
BLOCKS = (1, 3, 4)
# Differences of float32 states, relative to the largest, between a row alone and among others; and where a model sums
# along the row in another order.
SAME_ROWS, SAME_SUMS = 2e-6, 5e-6


def units(lengths: Sequence[int] = LENGTHS) -> list[Ids]:
    rng = np.random.default_rng(1)
    return [rng.integers(3, VOCABULARY, length).astype(np.int32) for length in lengths]


def engine_of(
    model: Any, parts: Parts, form: TapForm = "float32", dtype: str = "float32"
) -> TransformersEngine:
    packing = TapFormat(DTYPES[dtype], form)
    identity = StoreIdentity(
        engine="transformers",
        teacher="toy",
        weights="",
        final_norm="",
        architecture="",
        num_layers=LAYERS,
        hidden_size=WIDTH,
        vocab_size=VOCABULARY,
        blocks=list(BLOCKS),
        form=form,
        token_bytes=packing.token_bytes(WIDTH),
        ran={"dtype": dtype},
    )
    return TransformersEngine(identity, model, parts)


def unpacked(states: np.ndarray) -> Tensor:
    """Return float32 states [T, S, width]."""
    return torch.from_numpy(states).view(torch.float32)


@torch.no_grad()
def plain_states(model: Any, ids: Ids) -> tuple[list[Tensor], Tensor]:
    """Return the outputs of all blocks, as the residual stream has them, and the logits: one row, the whole model.

    A block's output is what the next block is given; the last block's is what the final norm is given.
    """
    given: dict[int, Tensor] = {}

    def keep(number: int) -> Any:
        def hook(_module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            given[number] = positional[0] if positional else named["hidden_states"]

        return hook

    inner = model.base_model
    layers = next(each for each in inner.children() if isinstance(each, nn.ModuleList))
    norm = [each for each in inner.children() if "norm" in type(each).__name__.lower()][-1]
    hooks = [
        each.register_forward_pre_hook(keep(number), with_kwargs=True)
        for number, each in enumerate([*layers, norm])
    ]
    logits = model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0]
    for hook in hooks:
        hook.remove()
    return [given[block][0] for block in range(1, len(layers) + 1)], logits


def logits_of(lens: StoredLens, hidden_ST: Tensor) -> Tensor:
    norm, extras = lens.norm, lens.extras
    normed_ST = FinalNorm(norm.weight_T, norm.bias_T, norm.epsilon, norm.kind)(hidden_ST)
    logits_SV = normed_ST @ lens.head_VT.T
    HeadExtras(extras.bias_V, extras.cap).apply(logits_SV, slice(None))
    return logits_SV
