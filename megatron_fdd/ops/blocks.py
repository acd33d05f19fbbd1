"""The forward pass of the fused losses: blocks of tokens, each gathered, swept and merged over the ranks.

A block's collectives run during the products of its neighbours: the tokens of the next block are gathered while this
block is swept, and this block's sums travel while the next block is swept. Where logits are held, the sums are waited
for at once: they are a few numbers a token, the logits of a second block are the whole vocabulary for each.

Shapes: N this rank's tokens, R tokens of a block (under sequence parallelism, of all ranks), T / D hidden width of
teacher / student.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from megatron_fdd.ops.heads import Model
from megatron_fdd.ops.kl_gradients import Normalisers, Upstream
from megatron_fdd.ops.request import Request
from megatron_fdd.ops.softmax_sums import SecondSums, SoftmaxSums, VocabStatistics, merge, start_merge
from megatron_fdd.ops.torch_sweeps import TorchSweeps
from megatron_fdd.ops.vocab_shard import Pending, label_logits


class LinearKL(NamedTuple):
    """One number for each token, [N], float32 (float64 for float64 input); None where it is not asked for."""

    divergence_N: Tensor | None  # includes the factor temperature**2
    teacher_lse_N: Tensor | None  # at temperature 1; never carries gradient
    student_lse_N: Tensor | None  # at temperature 1
    cross_entropy_N: Tensor | None  # at temperature 1; 0 without gradient where the label is negative


class Sweeps(Protocol):
    """The passes of one block over this rank's part of the vocabulary. They need no collectives."""

    def softmax_sums(self) -> SoftmaxSums:
        """Run the first sweep: online softmax, and with a constant head the sums that make up its gradient."""

    def second_sums(self, lse_M: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run the second sweep, for divergences that need both normalisers first.

        Returns:
            Sums of value and score (`Divergence.value_and_score`), [2, R]; and, with a constant head, the sum of
            score * W_S above the sum of p_S * W_S, [M, D].
        """

    def gradients(
        self,
        upstream: Upstream,
        normalisers: Normalisers,
        labels_R: Tensor | None,
        head_gradient_WD: Tensor | None,
    ) -> Tensor:
        """Run the last sweep: return the hidden states' gradient [R, D]; add the head's to `head_gradient_WD`."""


def make_sweeps(request: Request, teacher: Model | None, student: Model) -> Sweeps:
    """Make the sweeps of the implementation that `request.implementation` chooses."""
    if request.implementation.chosen(student[1], request.divergence) == "triton":
        from megatron_fdd.ops.gpu.sweeps import TritonSweeps  # only machines with a GPU have Triton

        return TritonSweeps(request, teacher, student)
    return TorchSweeps(request, teacher, student)


class Swept(NamedTuple):
    """A block after its first sweep, while the ranks exchange their sums."""

    rows: slice  # the block's rows of this rank's tokens
    teacher: Model | None  # hidden states of all ranks' tokens, with the head
    student: Model
    labels_R: Tensor | None
    sweeps: Sweeps
    sums: SoftmaxSums  # over this rank's part of the vocabulary
    packed: Pending


@dataclass(frozen=True, slots=True)
class TokenBlock:
    """A block of tokens, with the statistics of the whole vocabulary."""

    swept: Swept
    statistics: VocabStatistics
    second: SecondSums | None

    def outputs(self, request: Request) -> LinearKL:
        """Return what `request` asks for, for this rank's tokens."""
        statistics, labels_R = self.statistics, self.swept.labels_R
        value_R = statistics.kl_R if self.second is None else self.second.value_R
        *teacher_lse, student_lse_R = statistics.unit_lse_M.view(statistics.num_models, -1)
        entropy_R = None
        if labels_R is not None and statistics.label_logit_R is not None:
            entropy_R = (student_lse_R - statistics.label_logit_R).masked_fill_(labels_R < 0, 0.0)
        outputs = (
            None if value_R is None else value_R * request.temperature**2,
            teacher_lse[0] if teacher_lse and request.needs_lse else None,
            student_lse_R if request.needs_lse else None,
            entropy_R,
        )
        return LinearKL(*(None if output is None else request.shard.own_tokens(output) for output in outputs))


def finished_blocks(
    request: Request, teacher: Model | None, student: Model, labels_N: Tensor | None
) -> Iterator[TokenBlock]:
    """Yield the blocks of this rank's tokens, in order, with their statistics.

    Collectives for each block: under sequence parallelism one all-gather each of student, teacher and labels; one
    all-gather of the packed statistics; one all-reduce of [2, R] for divergences that need a second sweep.
    """
    at_once = request.shard.num_ranks == 1 or request.held_rows is not None
    for swept in _one_behind(_swept_blocks(request, teacher, student, labels_N), at_once=at_once):
        yield _finished(request, swept)


def finished_block(request: Request, teacher: Model | None, student: Model) -> TokenBlock:
    """Return this rank's tokens as one block. Collectives: those of `finished_blocks` for a block without labels."""
    rows = slice(0, len(student[0]))
    return _finished(
        request, _swept(request, teacher, student, rows, _gathers(request, teacher, student, None, rows))
    )


def _finished(request: Request, swept: Swept) -> TokenBlock:
    """Wait for the other ranks' sums, and run the second sweep if there is one."""
    statistics = merge(swept.sums, swept.packed, request.shard, has_labels=swept.labels_R is not None)
    second = None
    if request.two_sweep is not None:
        sums_2R, rows_MD = swept.sweeps.second_sums(statistics.lse_M)
        value_R, centre_R = request.shard.all_reduce(sums_2R)
        second = SecondSums(value_R, centre_R, rows_MD)
    return TokenBlock(swept, statistics, second)


type Gathers = list[Pending | None]  # the student's tokens, the teacher's, labels


def _gathers(
    request: Request, teacher: Model | None, student: Model, labels_N: Tensor | None, rows: slice
) -> Gathers:
    tensors = (student[0], None if teacher is None else teacher[0], labels_N)
    return [None if tensor is None else request.shard.start_gather(tensor[rows]) for tensor in tensors]


def _swept_blocks(
    request: Request, teacher: Model | None, student: Model, labels_N: Tensor | None
) -> Iterator[Swept]:
    started = (
        (rows, _gathers(request, teacher, student, labels_N, rows))
        for rows in request.blocks(len(student[0]))
    )
    for rows, gathers in _one_behind(started, at_once=request.shard.num_ranks == 1):
        yield _swept(request, teacher, student, rows, gathers)


def _swept(request: Request, teacher: Model | None, student: Model, rows: slice, gathers: Gathers) -> Swept:
    """Run a block's first sweep, and start to exchange its sums."""
    student_RD, teacher_RT, labels_R = (None if each is None else each.wait() for each in gathers)
    assert student_RD is not None
    block_student = (student_RD, student[1])
    block_teacher = None if teacher is None or teacher_RT is None else (teacher_RT, teacher[1])
    sweeps = make_sweeps(request, block_teacher, block_student)
    sums = sweeps.softmax_sums()
    label_logit_R = None
    if labels_R is not None:
        label_logit_R = label_logits(*block_student, labels_R, request.shard, request.student_extras)
    packed = start_merge(sums, label_logit_R, request.shard)
    return Swept(rows, block_teacher, block_student, labels_R, sweeps, sums, packed)


def _one_behind[Item](items: Iterable[Item], *, at_once: bool) -> Iterator[Item]:
    """Yield the same items, each after the next one has begun; `at_once`: each before that."""
    if at_once:
        yield from items
        return
    for before, _ in itertools.pairwise(itertools.chain(items, (None,))):
        assert before is not None
        yield before
