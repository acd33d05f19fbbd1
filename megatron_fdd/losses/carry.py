"""The carry: the last sampled layer, which a pipeline stage sends with its hidden states for the next delta.

The carry is appended on dim 0, so that hidden states and carry stay contiguous and every shape is known from
the plan; nothing is exchanged or synchronised for it (docs/gradients.md).

Shapes: S sequence (this rank's part), B micro-batch, D the student's hidden width, N = S*B token rows,
R rows of [B, D] that hold the log-sum-exps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fdd.losses.tap import TapStatistics
from megatron_fdd.ops.exact_cast import from_rows, rows_needed, to_rows


@dataclass(frozen=True, slots=True)
class Carry:
    """A sampled layer's student side on its way to the next sampled layer's chunk.

    Attributes:
        hidden_SBD: output of the sampled block, before the norm.
        statistics: its log-sum-exps, for the log-probability delta; else None.
    """

    hidden_SBD: Tensor
    statistics: TapStatistics | None


def carried_rows(sequence: int, micro_batch: int, width: int, dtype: torch.dtype, *, with_lse: bool) -> int:
    """Count the rows of dim 0 that a carry adds to hidden states [S, B, D]."""
    if not with_lse:
        return sequence
    return sequence + _lse_rows(sequence, micro_batch, width, dtype)


def append(hidden_SBD: Tensor, carry: Carry) -> Tensor:
    """Return a copy of the hidden states with the carry behind them, [S + S (+ R), B, D]; schedules want a copy."""
    parts = [hidden_SBD, carry.hidden_SBD]
    if carry.statistics is not None:
        _, micro_batch, width = hidden_SBD.shape
        lse_M = torch.cat([carry.statistics.teacher_lse_N, carry.statistics.student_lse_N])
        parts.append(to_rows(lse_M, micro_batch * width, hidden_SBD.dtype).view(-1, micro_batch, width))
    return torch.cat(parts)


def append_nothing(hidden_SBD: Tensor, rows: int) -> Tensor:
    """Return hidden states with `rows` rows of zeros behind them, if every boundary has the same shape."""
    _, micro_batch, width = hidden_SBD.shape
    return torch.cat([hidden_SBD, hidden_SBD.new_zeros(rows, micro_batch, width)])


def split(tensor: Tensor, sequence: int, *, with_lse: bool) -> tuple[Tensor, Carry]:
    """Undo `append`. Gradient flows back into `tensor`, that of the log-sum-exps in full float32."""
    hidden_SBD, carried_SBD = tensor[:sequence], tensor[sequence : 2 * sequence]
    if not with_lse:
        return hidden_SBD, Carry(carried_SBD, None)
    count = sequence * tensor.shape[1]
    lse_M = from_rows(tensor[2 * sequence :].flatten(1), 2 * count)
    return hidden_SBD, Carry(carried_SBD, TapStatistics(lse_M[:count].detach(), lse_M[count:]))


def _lse_rows(sequence: int, micro_batch: int, width: int, dtype: torch.dtype) -> int:
    return rows_needed(2 * sequence * micro_batch, micro_batch * width, dtype)
