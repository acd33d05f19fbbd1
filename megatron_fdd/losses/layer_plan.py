"""Which layers are compared with which, and what it costs. Integers only: no torch, no ranks."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from megatron_fdd.config import FddConfig


@dataclass(frozen=True, slots=True)
class LayerPair:
    """A sampled layer of each model, as the paper counts: output of block l, l = 1..L."""

    student_block: int
    teacher_block: int

    @property
    def student_layer(self) -> int:
        """Megatron's 0-based global layer index of the student's block."""
        return self.student_block - 1

    @property
    def teacher_layer(self) -> int:
        """Megatron's 0-based global layer index of the teacher's block."""
        return self.teacher_block - 1

    @property
    def name(self) -> str:
        """`s4:t9`: how logs name the pair."""
        return f"s{self.student_block}:t{self.teacher_block}"


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """What one chunk of the student (a pipeline stage's part of the layers) does for the losses.

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
    """

    config: FddConfig
    pairs: tuple[LayerPair, ...]
    num_stages: int
    student_layers: tuple[int, ...]
    teacher_layers: tuple[int, ...]
    vocab_size: int
    padded_vocab_size: int

    @property
    def chunks(self) -> tuple[ChunkPlan, ...]:
        """The student's chunks, in depth order."""
        return plan_chunks(self.pairs, self.student_layers, with_delta=self.config.beta > 0)

    def chunks_on(self, stage: int) -> tuple[ChunkPlan, ...]:
        """A stage's chunks, by virtual stage."""
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
        """Pairs whose teacher features a stage needs."""
        return {index for chunk in self.chunks_on(stage) for index in chunk.teacher_pairs}

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
    pairs: Sequence[LayerPair], chunk_layers: Sequence[int], *, with_delta: bool
) -> tuple[ChunkPlan, ...]:
    """One plan per chunk of the student, in depth order.

    Args:
        chunk_layers: how many layers each chunk holds, in depth order.
        with_delta: adjacent pairs are compared, so features travel between their chunks.
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
        needed = with_delta and 0 < len(before) < len(pairs)
        carries.append(before[-1] if needed else None)
    return tuple(
        ChunkPlan(chunk, carries[index], carries[index + 1], index == 0, index == len(held) - 1)
        for index, chunk in enumerate(held)
    )


def plan_pairs(config: FddConfig, student_layers: int, teacher_layers: int) -> tuple[LayerPair, ...]:
    """The layer pairs of a run, in depth order; empty when no term looks at an inner layer.

    Raises:
        ValueError: pairs out of range or not increasing, or more sampled layers than a model has.
    """
    if not config.uses_taps:
        return ()
    if config.layer_pairs is None:
        students = sample_blocks(config.layer_rule, config.layers, student_layers, "student")
        teachers = sample_blocks(config.layer_rule, config.layers, teacher_layers, "teacher")
        return tuple(LayerPair(s, t) for s, t in zip(students, teachers, strict=True))
    for column, num_layers, model in ((0, student_layers, "student"), (1, teacher_layers, "teacher")):
        _check_blocks([pair[column] for pair in config.layer_pairs], num_layers, model)
    return tuple(LayerPair(s, t) for s, t in config.layer_pairs)


def sample_blocks(rule: str, num_sampled: int, num_layers: int, model: str) -> list[int]:
    """`num_sampled` 1-based block numbers of a model with `num_layers` (docs/method.md).

    Raises:
        ValueError: the rule would need a block 0, or sample one block twice.
    """
    if num_sampled + 1 > num_layers:
        raise ValueError(
            f"--fdd-layers {num_sampled} needs a {model} of at least {num_sampled + 1} layers, "
            f"it has {num_layers}: "
            f"lower --fdd-layers to at most {num_layers - 1}, or name the layers with --fdd-layer-pairs"
        )
    steps = range(1, num_sampled + 1)
    if rule == "paper":
        return [step * (num_layers // (num_sampled + 1)) for step in steps]
    return [step * num_layers // (num_sampled + 1) for step in steps]


def check_recompute_keeps_taps(
    layers: Sequence[int], stage_layers: Sequence[int], recompute: tuple[str | None, str | None, int | None]
) -> None:
    """Refuse full/uniform recompute that would drop a tap without a word: Megatron returns group ends only.

    Args:
        layers: tapped layers, 0-based.
        stage_layers: how many layers each pipeline stage holds; groups begin anew on each.
        recompute: Megatron's recompute granularity, method and number of layers.

    Raises:
        ValueError: a tap lies inside a recomputed group.
    """
    granularity, method, group = recompute
    if granularity != "full" or method != "uniform" or not group:
        return
    ends: set[int] = set()
    for last in accumulate(stage_layers):
        first = max(ends, default=0)
        ends |= {*range(first + group, last, group), last}
    hidden = [layer + 1 for layer in layers if layer + 1 not in ends]
    if hidden:
        raise ValueError(
            f"--recompute-method uniform --recompute-num-layers {group} hides the tapped blocks {hidden} "
            "(Megatron returns the last block of each recomputed group only): use --recompute-num-layers 1, "
            "--recompute-method block, or pairs whose student blocks end a group"
        )


def _check_blocks(blocks: Sequence[int], num_layers: int, model: str) -> None:
    for block in blocks:
        if not 1 <= block <= num_layers:
            raise ValueError(f"--fdd-layer-pairs: {model} block {block} is not in 1..{num_layers}")
    if any(later <= earlier for earlier, later in zip(blocks, blocks[1:], strict=False)):
        raise ValueError(f"--fdd-layer-pairs: {model} blocks {list(blocks)} must increase")
