"""The product of a held gradient of logits with the head, without the tiles in which no probability is large enough.

Shapes: R tokens, M rows = R per model (teacher's first, student's last), K tiles of the vocabulary, C columns of all of
them, D the student's width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_fdd.ops.kl_gradients import Normalisers
from megatron_fdd.ops.request import Request
from megatron_fdd.ops.torch_sweeps import WORTH_SKIPPING
from megatron_fdd.ops.vocab_tiles import accumulate


def kept_tiles(request: Request, peaks_KM: Tensor, normalisers: Normalisers) -> Tensor:
    """Tell for each tile and token whether any probability in the gradient reaches `skip_below`, bool [K, R].

    Args:
        peaks_KM: largest logit over the temperature, of each tile and row.
    """
    num_tokens = len(normalisers.unit_lse_R)
    student_KR = peaks_KM[:, -num_tokens:]
    gap_KR = student_KR - normalisers.lse_M[-num_tokens:]
    if request.needs_both_temperatures:
        gap_KR = torch.maximum(gap_KR, student_KR * request.temperature - normalisers.unit_lse_R)
    if request.divergence is not None and request.divergence.teacher_leads:
        gap_KR = torch.maximum(gap_KR, peaks_KM[:, :num_tokens] - normalisers.lse_M[:num_tokens])
    return gap_KR >= math.log(request.implementation.skip_below)


def add_kept_product(
    total_RD: Tensor, gradient_RC: Tensor, head_CD: Tensor, kept_KR: Tensor, tile_size: int
) -> None:
    """Add gradient @ head to `total_RD`, except the tokens of each tile that are not kept. One host synchronisation."""
    num_tokens = len(total_RD)
    counts = kept_KR.sum(1).tolist()
    if min(counts) >= WORTH_SKIPPING * num_tokens:
        accumulate(total_RD, gradient_RC, head_CD)
        return
    order_KR = kept_KR.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    for index, count in enumerate(counts):
        columns = slice(index * tile_size, (index + 1) * tile_size)
        if count >= WORTH_SKIPPING * num_tokens:
            accumulate(total_RD, gradient_RC[:, columns], head_CD[columns])
        elif count > 0:
            rows = order_KR[index, :count]
            sums_RD = total_RD.index_select(0, rows)
            accumulate(sums_RD, gradient_RC[:, columns].index_select(0, rows), head_CD[columns])
            total_RD.index_copy_(0, rows, sums_RD)
