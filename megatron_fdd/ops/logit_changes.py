"""The changes of a model's logits between two layers, streamed over the vocabulary.

Shapes: R all tokens of the tensor-parallel group under sequence parallelism (else this rank's), X hidden width of the
model, W rows of this rank's head shard, C rows of a tile of it. Everything is float32 (float64 for float64).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from megatron_fdd.ops.full_precision import exact_product
from megatron_fdd.ops.head_extras import HeadExtras
from megatron_fdd.ops.heads import Heads
from megatron_fdd.ops.vocab_tiles import statistics_dtype


class Ends(NamedTuple):
    """Normed hidden states of a model's two layers, of this rank's tokens."""

    earlier: Tensor
    later: Tensor


class LogitChanges:
    """The changes of one model's logits, tile by tile, minus a number for each token.

    That number is the change of the capped mean logit, which is near the change's mean: what is left has no large mean
    that would drown the rest in sums of squares. Collectives when it is made: under sequence parallelism two
    all-gathers of [N, X].

    Args:
        head_WX, extras: the model's.
        mean_X: the head's column means over the whole vocabulary.
        heads: both models', for the shard and the sizes of tiles and blocks.
    """

    def __init__(self, ends: Ends, head_WX: Tensor, extras: HeadExtras, mean_X: Tensor, heads: Heads) -> None:
        dtype = statistics_dtype(heads.student_WD)
        self._head_WX, self.extras = head_WX.detach(), extras
        self._num_valid = heads.shard.num_valid
        self._tile_size = heads.implementation.tile_columns(heads.student_WD, None)
        self._block_rows = heads.implementation.block_rows
        pending = [heads.shard.start_gather(tensor.detach().to(dtype)) for tensor in ends]
        self.ends = Ends(*(each.wait() for each in pending))
        earlier_R, later_R = (end_RX @ mean_X for end_RX in self.ends)
        for mean_R in (earlier_R, later_R):
            extras.squash(mean_R)
        self.centre_R = later_R - earlier_R

    def tiles(self) -> Iterator[slice]:
        """Yield the rows of the heads that are vocabulary, tile by tile."""
        for start in range(0, self._num_valid, self._tile_size):
            yield slice(start, min(start + self._tile_size, self._num_valid))

    def blocks(self) -> Iterator[slice]:
        """Yield the tokens, block by block."""
        for start in range(0, len(self.centre_R), self._block_rows):
            yield slice(start, start + self._block_rows)

    def head(self, columns: slice) -> Tensor:
        """Return the head's rows of a tile, [C, X]."""
        return self._head_WX[columns].to(self.centre_R.dtype)

    def logits(self, rows: slice, columns: slice, head_CX: Tensor) -> tuple[Tensor, Tensor]:
        """Return a block's logits of both layers in a tile, [at most block_rows, C] each."""
        earlier_RC, later_RC = (exact_product(end_RX[rows], head_CX.T) for end_RX in self.ends)
        for logits_RC in (earlier_RC, later_RC):
            self.extras.apply(logits_RC, columns)
        return earlier_RC, later_RC

    def change(self, rows: slice, columns: slice, head_CX: Tensor) -> Tensor:
        """Return a block's changes in a tile, minus `centre_R`; they may be overwritten."""
        earlier_RC, later_RC = self.logits(rows, columns, head_CX)
        return later_RC.sub_(earlier_RC).sub_(self.centre_R[rows, None])
