"""What one call of linear_kl has to compute: the choices that every sweep shares."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_fdd.ops.divergence import Divergence
from megatron_fdd.ops.implementation import Implementation
from megatron_fdd.ops.vocab_shard import VocabShard


@dataclass(frozen=True, slots=True)
class Request:
    """The call's options, and what follows from them."""

    shard: VocabShard
    divergence: Divergence | None
    needs_lse: bool
    has_labels: bool
    implementation: Implementation
    body_gradient: bool  # the head is constant: the hidden states' gradient comes from sums of forward sweeps
    head_gradient: bool  # the head is trained: one more sweep, after the normalisers, gives both gradients
    # Where set, a block's logits stay for that sweep: at most so many tokens, the whole vocabulary.
    held_rows: int | None = None

    @property
    def temperature(self) -> float:
        """Of the divergence; without one 1."""
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
        """The divergence, where the first sweep gives it."""
        return self.divergence if self.divergence is not None and self.divergence.one_sweep else None

    @property
    def two_sweep(self) -> Divergence | None:
        """The divergence, where it needs a second sweep, after the normalisers."""
        return self.divergence if self.divergence is not None and not self.divergence.one_sweep else None

    def blocks(self, num_tokens: int) -> list[slice]:
        """This rank's tokens in equal blocks, of at most `block_rows` with the other ranks'; at least one."""
        limit = self.implementation.block_rows
        if self.held_rows is not None:
            limit = min(limit, self.held_rows)
        ranks = self.shard.num_ranks if self.shard.splits_tokens else 1
        count = max(1, -(-num_tokens * ranks // limit))
        size = max(1, -(-num_tokens // count))
        starts = range(0, max(1, num_tokens), size)
        return [slice(start, min(start + size, num_tokens)) for start in starts]
