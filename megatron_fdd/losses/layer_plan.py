"""The plan of the losses: which taps each chunk of the student holds, and what it sends on. No ranks."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from megatron_fdd.config import FddConfig
from megatron_fdd.losses.pairs import LayerPair
from megatron_fdd.losses.terms import compares_taps


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """The part of one chunk of the student (some layers of a pipeline stage) in the losses.

    Pairs are named by their index in the run's pairs.

    Attributes:
        pairs: those whose student layer lies here, in depth order.
        carry_in: the pair before them, whose features arrive from the chunk before; None if none is needed.
        carry_out: the pair whose features go on to the next chunk; None if no later chunk needs one.
        is_first: holds the embedding.
        is_last: holds the final norm and the head.
    """

    pairs: tuple[int, ...]
    carry_in: int | None
    carry_out: int | None
    is_first: bool
    is_last: bool

    @property
    def teacher_pairs(self) -> tuple[int, ...]:
        """Pairs whose teacher features are needed here. A carry is used only by a tap behind it."""
        return self.pairs if self.carry_in is None or not self.pairs else (self.carry_in, *self.pairs)


@dataclass(frozen=True, slots=True)
class Plan:
    """All that is decided about the losses of a run before any process group exists.

    Attributes:
        num_stages: pipeline stages.
        student_layers: how many layers each chunk of the student holds, in depth order: with virtual stages
            chunk c is on stage c % num_stages.
        teacher_layers: how many layers each stage of the teacher holds; no teacher: empty.
        vocab_size: tokens that count in every softmax: what tokenizer and both models share, no padding.
        padded_vocab_size: rows of both heads.
        is_student_capped, is_teacher_capped: whether a model's logits have a soft cap; of stored teachers the lens says
            it.
    """

    config: FddConfig
    pairs: tuple[LayerPair, ...]
    num_stages: int
    student_layers: tuple[int, ...]
    teacher_layers: tuple[int, ...]
    vocab_size: int
    padded_vocab_size: int
    is_student_capped: bool = False
    is_teacher_capped: bool = False

    @property
    def chunks(self) -> tuple[ChunkPlan, ...]:
        """The student's chunks, in depth order."""
        return plan_chunks(self.pairs, self.student_layers, with_carry=compares_taps(self.config))

    def chunks_on(self, stage: int) -> tuple[ChunkPlan, ...]:
        """Return the chunks of a stage, by virtual stage."""
        return self.chunks[stage :: self.num_stages]

    @property
    def tapping_stages(self) -> tuple[int, ...]:
        """Stages that need the lens."""
        return tuple(
            stage for stage in range(self.num_stages) if any(chunk.pairs for chunk in self.chunks_on(stage))
        )

    @property
    def copying_stages(self) -> tuple[int, ...]:
        """Stages with a tap on a chunk that does not hold the head itself."""
        return tuple(
            stage
            for stage in range(self.num_stages)
            if any(chunk.pairs and not chunk.is_last for chunk in self.chunks_on(stage))
        )

    def teacher_pairs(self, stage: int) -> set[int]:
        """Return the pairs whose teacher features a stage needs."""
        return {index for chunk in self.chunks_on(stage) for index in chunk.teacher_pairs}

    def teacher_blocks(self, stage: int) -> set[int]:
        """Return the teacher's blocks that a stage reads through the lens."""
        return {self.pairs[index].teacher_block for index in self.teacher_pairs(stage)}

    @property
    def has_one_width(self) -> bool:
        """Whether every boundary has the room of a carry: interleaved schedules know one shape only."""
        is_interleaved = len(self.student_layers) > self.num_stages
        return is_interleaved and any(chunk.carry_out is not None for chunk in self.chunks)

    @property
    def teacher_stages(self) -> tuple[int, ...]:
        """Which stage of the teacher holds each pair's layer."""
        edges = list(accumulate(self.teacher_layers))
        return tuple(bisect_right(edges, pair.teacher_layer) for pair in self.pairs)


def plan_chunks(
    pairs: Sequence[LayerPair], chunk_layers: Sequence[int], *, with_carry: bool
) -> tuple[ChunkPlan, ...]:
    """Make one plan for each chunk of the student, in depth order.

    Args:
        chunk_layers: how many layers each chunk holds, in depth order.
        with_carry: adjacent pairs are compared, so features travel between their chunks.
    """
    edges = [sum(chunk_layers[:count]) for count in range(len(chunk_layers) + 1)]
    held = [
        tuple(index for index, pair in enumerate(pairs) if first <= pair.student_layer < last)
        for first, last in zip(edges, edges[1:], strict=False)
    ]
    assert sum(len(chunk) for chunk in held) == len(pairs), f"{pairs} in chunks of {chunk_layers} layers"
    carries: list[int | None] = [None]  # over each chunk's lower edge
    for last in edges[1:]:
        before = [index for index, pair in enumerate(pairs) if pair.student_layer < last]
        needed = with_carry and 0 < len(before) < len(pairs)
        carries.append(before[-1] if needed else None)
    return tuple(
        ChunkPlan(chunk, carries[index], carries[index + 1], index == 0, index == len(held) - 1)
        for index, chunk in enumerate(held)
    )
