"""What each teacher of a run has to say about a micro-batch, on the rows that are its own.

Which rows these are follows from integers that all ranks know. A sample is one teacher's, and all samples are cut over
the ranks alike. Only where samples lie one behind the other (packed sequences) and sequence parallelism cuts that row
do tensor-parallel ranks have unequal numbers of a teacher's rows, even none; they are filled up to the largest number,
so that collectives have one shape.

Shapes: S sequence (this rank's part), B micro-batch, H hidden, N = S*B token rows of this rank in sequence-major order,
M rows that are one teacher's, filler included, Q tensor-parallel parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_fdd.data.batch import Batch
from megatron_fdd.host.topology import Topology
from megatron_fdd.losses.carry import Carry
from megatron_fdd.losses.features import TeacherFeatures
from megatron_fdd.losses.objective import Objective
from megatron_fdd.losses.tap import TapStatistics, TokenWeights
from megatron_fdd.step.teacher.teacher import Teacher

NO_LABEL = -100
Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Share:
    """A teacher's part of a micro-batch on this rank.

    Attributes:
        samples: which samples of the micro-batch, ascending.
        rows: which of this rank's rows, ascending.
        filler: how many rows are to stand behind them.
        first: how many of the teacher's rows lie on tensor-parallel ranks before this one.
        is_whole: every row of the micro-batch is this teacher's.
    """

    samples: tuple[int, ...]
    rows: Rows
    filler: int
    first: int
    is_whole: bool


def share_of(batch: Batch, number: int, topology: Topology) -> Share:
    """Return the part of a micro-batch that is a teacher's.

    Args:
        number: of the teacher; 0 where the run has one.
    """
    parts, rank = (topology.tensor_size, topology.tensor_rank) if topology.sequence_parallel else (1, 0)
    teachers_B = np.array([0] if batch.teachers is None else batch.teachers)
    num_rows = batch.tokens_BS.numel() // parts
    if (teachers_B == number).all():
        everything = tuple(range(len(teachers_B)))
        return Share(everything, np.arange(num_rows), filler=0, first=rank * num_rows, is_whole=True)
    owner_QN = _owners(teachers_B, num_rows * parts, parts, is_one_row=batch.packed is not None)
    own_QN = owner_QN == number
    counts_Q = own_QN.sum(1)
    rows = np.flatnonzero(own_QN[rank])
    return Share(
        samples=tuple(np.flatnonzero(teachers_B == number).tolist()),
        rows=rows,
        filler=int(counts_Q.max()) - len(rows),
        first=int(counts_Q[:rank].sum()),
        is_whole=False,
    )


def _owners(teachers_B: Rows, num_rows: int, parts: int, *, is_one_row: bool) -> Rows:
    """Return the number of each row's teacher, [Q, N]; `num_rows` of all parts."""
    each = num_rows // len(teachers_B)
    if is_one_row:
        return np.repeat(teachers_B, each).reshape(parts, -1)
    return np.broadcast_to(np.tile(teachers_B, each // parts), (parts, num_rows // parts))


@dataclass(frozen=True, slots=True)
class Course:
    """A teacher of a run on one chunk.

    Attributes:
        objective: compares the student with it.
        teacher: None if no term needs one.
    """

    objective: Objective
    teacher: Teacher | None


@dataclass(frozen=True, slots=True)
class Lesson:
    """A teacher's part of one micro-batch.

    Attributes:
        number: of its course.
        features: of the teacher's rows; None without a teacher.
        weights, labels_N: of these rows.
    """

    number: int
    objective: Objective
    features: TeacherFeatures | None
    weights: TokenWeights
    labels_N: Tensor


class Dealing:
    """The rows of a micro-batch, dealt among the teachers that are in it. With one teacher nothing is copied.

    Args:
        shares: of those teachers; together they have every row.
    """

    def __init__(self, shares: Sequence[Share], device: torch.device) -> None:
        self._shares = list(shares)
        self._order_M: Tensor | None = None
        self._is_filler_M: Tensor | None = None
        if len(shares) == 1 and shares[0].is_whole:
            return
        self._sizes = [len(share.rows) + share.filler for share in shares]
        order = np.concatenate([np.pad(share.rows, (0, share.filler)) for share in shares])
        self._order_M = _on(device, order)
        if any(share.filler for share in shares):
            is_filler = [
                np.arange(size) >= size - share.filler
                for size, share in zip(self._sizes, shares, strict=True)
            ]
            self._is_filler_M = _on(device, np.concatenate(is_filler))

    def hidden(self, hidden_SBH: Tensor) -> list[Tensor]:
        """Return each teacher's rows of hidden states, [M, 1, H]; the tensor itself if all rows are one teacher's."""
        if self._order_M is None:
            return [hidden_SBH]
        rows_MH = hidden_SBH.flatten(0, 1).index_select(0, self._order_M)
        return list(rows_MH[:, None].split(self._sizes))

    def rows(self, value_N: Tensor, *, filler: float) -> list[Tensor]:
        """Return each teacher's rows, [N] -> [M]."""
        if self._order_M is None:
            return [value_N]
        value_M = value_N.index_select(0, self._order_M)
        if self._is_filler_M is not None:
            value_M = value_M.masked_fill(self._is_filler_M, filler)
        return list(value_M.split(self._sizes))

    def weights(self, weights: TokenWeights) -> list[TokenWeights]:
        """Return the weights of each teacher's rows; filler weighs nothing."""
        labels, terms = (self.rows(each, filler=0.0) for each in (weights.label_N, weights.term_N))
        return [TokenWeights(*each) for each in zip(labels, terms, strict=True)]

    def carries(self, carry: Carry | None) -> Sequence[Carry | None]:
        """Return each teacher's rows of what the chunk before has sent."""
        if carry is None or self._order_M is None:
            return [carry] * len(self._shares)
        hiddens, statistics = self.hidden(carry.hidden_SBD), carry.statistics
        if statistics is None:
            return [Carry(hidden_MD, None) for hidden_MD in hiddens]
        both = (self.rows(each, filler=0.0) for each in (statistics.teacher_lse_N, statistics.student_lse_N))
        return [
            Carry(hidden_MD, TapStatistics(*each)) for hidden_MD, *each in zip(hiddens, *both, strict=True)
        ]

    def joined(self, carries: Sequence[Carry | None], last_SBD: Tensor) -> Carry | None:
        """Join what the teachers' objectives send to the next chunk; None if they send nothing.

        Args:
            last_SBD: the output of the chunk's last sampled block, all rows.
        """
        if self._order_M is None or carries[0] is None:
            return carries[0]
        parts = [each.statistics for each in carries if each is not None and each.statistics is not None]
        if not parts:
            return Carry(last_SBD, None)
        teacher = self._whole([each.teacher_lse_N for each in parts])
        return Carry(last_SBD, TapStatistics(teacher, self._whole([each.student_lse_N for each in parts])))

    def _whole(self, parts_M: Sequence[Tensor]) -> Tensor:
        """Put each teacher's rows back, [M] -> [N]."""
        assert self._order_M is not None
        counts = [len(share.rows) for share in self._shares]
        own = [part_M[:count] for part_M, count in zip(parts_M, counts, strict=True)]
        order = [each[:count] for each, count in zip(self._order_M.split(self._sizes), counts, strict=True)]
        return parts_M[0].new_zeros(sum(counts)).index_copy(0, torch.cat(order), torch.cat(own))


def _on(device: torch.device, values: NDArray[Any]) -> Tensor:
    """Copy to a device, without waiting for it."""
    values_M = torch.from_numpy(values)
    return (values_M.pin_memory() if device.type == "cuda" else values_M).to(device, non_blocking=True)
