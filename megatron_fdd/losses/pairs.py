"""The pairs of layers, one of each model, that are compared. Integers only: no torch, no ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


def plan_pairs(config: FddConfig, student_layers: int, teacher_layers: int) -> tuple[LayerPair, ...]:
    """Choose the layer pairs of a run, in depth order.

    Raises:
        ValueError: pairs out of range or not increasing, or more sampled layers than a model has.
    """
    if config.layer_pairs is None:
        students = sample_blocks(config.layer_rule, config.layers, student_layers, "student")
        teachers = sample_blocks(config.layer_rule, config.layers, teacher_layers, "teacher")
        return tuple(LayerPair(s, t) for s, t in zip(students, teachers, strict=True))
    for column, num_layers, model in ((0, student_layers, "student"), (1, teacher_layers, "teacher")):
        _check_blocks([pair[column] for pair in config.layer_pairs], num_layers, model)
    return tuple(LayerPair(s, t) for s, t in config.layer_pairs)


def sample_blocks(rule: str, num_sampled: int, num_layers: int, model: str) -> list[int]:
    """Choose `num_sampled` 1-based block numbers of a model with `num_layers` (docs/method.md).

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


def _check_blocks(blocks: Sequence[int], num_layers: int, model: str) -> None:
    """Refuse block numbers that a model does not have, or that do not increase."""
    for block in blocks:
        if not 1 <= block <= num_layers:
            raise ValueError(f"--fdd-layer-pairs: {model} block {block} is not in 1..{num_layers}")
    if any(later <= earlier for earlier, later in zip(blocks, blocks[1:], strict=False)):
        raise ValueError(f"--fdd-layer-pairs: {model} blocks {list(blocks)} must increase")
