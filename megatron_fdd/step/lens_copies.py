"""Copies of a lens for the pipeline stages that have a tap and no head, from the stage that owns the lens.

The teacher's lens is sent once; the student's once per step, before its micro-batches. Copies are constants: they
are in no module, no optimizer, no checkpoint and no gradient norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_fdd.host.layer_specs import final_norm_factor, final_norm_has_bias, logit_cap
from megatron_fdd.losses.lens import FinalNorm, Lens
from megatron_fdd.ops.head_extras import HeadExtras


class LensCopies:
    """The way of one model's lens from the last stage to the stages that tap, over the pipeline group.

    It is a broadcast, which takes as long as one send. Sends one by one would take as long as all together, and each
    pair of stages would open a communicator of its own in NCCL.

    Args:
        stages: the stages that need a copy, or the last one; the same on every rank.
        group: this rank's pipeline group.
    """

    def __init__(self, stages: Sequence[int], group: ProcessGroup) -> None:
        self._stages = [stage for stage in stages if stage != group.size() - 1]
        self._group = group
        self._copy: Lens | None = None

    def refresh(self, lens: Lens | None, empty: Callable[[], Lens]) -> Lens | None:
        """Send the lens, and return this stage's: the owner's own, a fresh copy, or None where nothing is tapped.

        Args:
            lens: on the owner, its present lens.
            empty: makes a lens of the same shapes and dtypes to receive into; called once where it is needed, and each
                time on other stages, which forget what they receive.

        Collectives over the pipeline group: one broadcast of each tensor of the lens; none if no other stage taps.
        """
        owner, stage = self._group.size() - 1, self._group.rank()
        if not self._stages:
            return lens
        own = lens if stage == owner else self._copy or empty()
        assert own is not None
        for tensor in _tensors(own):
            dist.broadcast(tensor.contiguous(), group=self._group, group_src=owner)
        if stage in self._stages:
            self._copy = own
        return own if stage == owner else self._copy


def empty_lens(config: TransformerConfig, rows: int, *, with_norm: bool) -> Lens:
    """Make an empty lens of a model to receive into: head [rows, H], norm weight and bias [H]."""
    device, width, dtype = torch.cuda.current_device(), config.hidden_size, config.params_dtype
    norm = None
    if with_norm:
        has_bias = final_norm_has_bias(config)
        bias_H = torch.empty(width, dtype=dtype, device=device) if has_bias else None
        weight_H = torch.empty(width, dtype=dtype, device=device)
        kind: Literal["layer", "rms"] = "layer" if config.normalization == "LayerNorm" else "rms"
        norm = FinalNorm(weight_H, bias_H, config.layernorm_epsilon, kind, final_norm_factor(config))
    head_WH = torch.empty(rows, width, dtype=dtype, device=device)
    return Lens(head_WH, norm, HeadExtras(cap=logit_cap(config)))


def _tensors(lens: Lens) -> list[Tensor]:
    norm = [] if lens.norm is None else [lens.norm.weight_H, lens.norm.bias_H]
    return [tensor.detach() for tensor in (lens.head_WH, *norm) if tensor is not None]
