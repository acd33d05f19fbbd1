"""The request of one call of a fused loss: the choices that all its sweeps share."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_fdd.ops.divergence import Divergence
from megatron_fdd.ops.head_extras import NO_EXTRAS, HeadExtras
from megatron_fdd.ops.implementation import Implementation
from megatron_fdd.ops.vocab_shard import VocabShard


@dataclass(frozen=True, slots=True)
class Request:
    """One call's options, and the decisions that follow from them."""

    shard: VocabShard
    divergence: Divergence | None
    needs_lse: bool
    has_labels: bool
    implementation: Implementation
    body_gradient: bool  # the head is constant: the hidden states' gradient comes from sums of forward sweeps
    head_gradient: bool  # one more sweep, after the normalisers, gives the gradients: the head may be trained
    # If set, a block has at most so many tokens, and its logits (the whole vocabulary) are kept for that sweep.
    held_rows: int | None = None
    # Whether the gradient of held logits leaves out tiles in which no probability reaches `implementation.skip_below`.
    skips_tiles: bool = False
    teacher_extras: HeadExtras = NO_EXTRAS
    student_extras: HeadExtras = NO_EXTRAS

    @property
    def temperature(self) -> float:
        """The temperature of the divergence; 1 without a divergence."""
        return self.divergence.temperature if self.divergence else 1.0

    @property
    def needs_temperature_one(self) -> bool:
        """Whether anything at temperature 1 (log-sum-exp, cross-entropy) is an output."""
        return self.needs_lse or self.has_labels

    @property
    def needs_both_temperatures(self) -> bool:
        """Whether temperature 1 needs normalisers of its own."""
        return self.needs_temperature_one and self.temperature != 1.0

    @property
    def one_sweep(self) -> Divergence | None:
        """The divergence, if the first sweep gives it; else None."""
        return self.divergence if self.divergence is not None and self.divergence.one_sweep else None

    @property
    def two_sweep(self) -> Divergence | None:
        """The divergence, if it needs a second sweep, after the normalisers; else None."""
        return self.divergence if self.divergence is not None and not self.divergence.one_sweep else None

    def blocks(self, num_tokens: int) -> list[slice]:
        """Cut this rank's tokens into at least one block, of at most `block_rows` with the other ranks' tokens."""
        limit = self.implementation.block_rows
        if self.held_rows is not None:
            limit = min(limit, self.held_rows)
        ranks = self.shard.num_ranks if self.shard.splits_tokens else 1
        count = max(1, -(-num_tokens * ranks // limit))
        size = max(1, -(-num_tokens // count))
        starts = range(0, max(1, num_tokens), size)
        return [slice(start, min(start + size, num_tokens)) for start in starts]
