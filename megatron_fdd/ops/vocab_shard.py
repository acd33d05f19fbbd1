"""The split of a head's rows over tensor-parallel ranks, and the few collectives that it needs.

Shapes: N this rank's tokens, R tokens after the gather (N, or N * ranks under sequence parallelism),
D hidden width, W rows of the head shard.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from megatron_fdd.ops.head_extras import HeadExtras
from megatron_fdd.ops.vocab_tiles import statistics_dtype


class Pending:
    """A tensor that a collective may still be writing; work that runs before `wait` hides the collective."""

    def __init__(self, tensor: Tensor, work: Work | None = None, *, keeps: Tensor | None = None) -> None:
        """Hold the result. `keeps`: the tensor that the collective reads, kept alive until `wait`."""
        self._tensor, self._work, self._keeps = tensor, work, keeps

    def map(self, view: Callable[[Tensor], Tensor]) -> Pending:
        """Return the same collective's result under another view."""
        self._tensor = view(self._tensor)
        return self

    def wait(self) -> Tensor:
        """Return the finished tensor; on a GPU the current stream waits, not the host."""
        if self._work is not None:
            self._work.wait()
            self._work = self._keeps = None
        return self._tensor


@dataclass(frozen=True, slots=True)
class VocabShard:
    """The place of this rank's rows of the heads in the vocabulary.

    first: vocabulary id of row 0 of the head shard.
    num_valid: rows of the shard that are vocabulary (may be 0); the rest are padding and left out everywhere.
    group: the tensor-parallel group (None or one rank: no collectives).
    sequence_parallel: rows of hidden states are this rank's shard of the tokens, gathered forward and reduce-scattered
        backward. Every rank must then pass the same number of rows. Otherwise all ranks pass the same rows.
    gpu_bytes: memory of the group's smallest GPU (`smallest_gpu_bytes`), so that all ranks hold as many logits. None:
        each rank goes by its own GPU, so that the GPUs of a group must be alike.
    """

    first: int
    num_valid: int
    group: ProcessGroup | None
    sequence_parallel: bool = False
    gpu_bytes: int | None = None

    def __post_init__(self) -> None:
        assert self.first >= 0, f"first vocabulary id {self.first}"
        assert self.num_valid >= 0, f"{self.num_valid} valid rows"

    @property
    def num_ranks(self) -> int:
        """Number of ranks that share the vocabulary."""
        return 1 if self.group is None else self.group.size()

    @property
    def rank(self) -> int:
        """This rank's index among them."""
        return 0 if self.group is None else self.group.rank()

    @property
    def splits_tokens(self) -> bool:
        """Whether other ranks hold other tokens."""
        return self.sequence_parallel and self.num_ranks > 1

    @property
    def shares_tokens(self) -> bool:
        """Whether several ranks hold the same tokens, so that each can compute a share of what all need."""
        return self.num_ranks > 1 and not self.sequence_parallel

    def start_gather(self, tensor: Tensor) -> Pending:
        """Gather all ranks' tokens, [N, ...] -> [R, ...]. Collectives: one all-gather under sequence parallelism."""
        return self.start_stack(tensor).map(_flatten) if self.splits_tokens else Pending(tensor)

    def own_tokens(self, tensor: Tensor) -> Tensor:
        """Return this rank's part of dim 0, [R, ...] -> [N, ...]. No collective."""
        return tensor.chunk(self.num_ranks)[self.rank] if self.splits_tokens and len(tensor) else tensor

    def token_share(self, tensor: Tensor) -> Tensor:
        """Return this rank's share of rows that all ranks hold, [N, ...] -> [at most ceil(N / ranks), ...].

        It is a copy, so that the share does not keep the rest alive; without shared tokens it is the tensor itself.
        No collective.
        """
        if not self.shares_tokens:
            return tensor
        size = self._share_size(len(tensor))
        return tensor[self.rank * size : (self.rank + 1) * size].clone()

    def join_shares(self, share: Tensor, num_tokens: int) -> Tensor:
        """Join all ranks' shares, [n, ...] -> [N, ...]; without shared tokens return the tensor itself.

        Collectives: one all-gather of [ceil(N / ranks), ...] where all ranks hold the same tokens, else none.
        """
        if not self.shares_tokens:
            return share
        # The last ranks' shares may be smaller, or empty; an all-gather needs equal sizes.
        padded = share.new_zeros((self._share_size(num_tokens), *share.shape[1:]))
        padded[: len(share)] = share
        return self.start_stack(padded).wait().flatten(0, 1)[:num_tokens]

    def _share_size(self, num_tokens: int) -> int:
        return -(-num_tokens // self.num_ranks)

    def start_reduce(self, tensor: Tensor) -> Pending:
        """Start to sum [R, ...] over ranks; each rank keeps its own tokens, [N, ...]. May overwrite `tensor`.

        Collectives: one all-reduce, or under sequence parallelism one reduce-scatter.
        """
        if self.num_ranks == 1 or tensor.numel() == 0:
            return Pending(tensor)
        given = tensor.contiguous()
        if not self.splits_tokens:
            return Pending(given, dist.all_reduce(given, group=self.group, async_op=True))
        own = given.new_empty((len(given) // self.num_ranks, *given.shape[1:]))
        work = dist.reduce_scatter_tensor(own, given, group=self.group, async_op=True)
        return Pending(own, work, keeps=given)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place when contiguous. Collectives: one all-reduce."""
        if self.num_ranks > 1 and tensor.numel() > 0:
            tensor = tensor.contiguous()
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def start_stack(self, tensor: Tensor) -> Pending:
        """Start to stack every rank's tensor, [ranks, ...]. Collectives: one all-gather."""
        if self.num_ranks == 1 or tensor.numel() == 0:
            return Pending(tensor.expand(self.num_ranks, *tensor.shape))
        stacked = tensor.new_empty((self.num_ranks, *tensor.shape))
        given = tensor.contiguous().view(-1)
        # Flat, because gloo and nccl both take that form.
        work = dist.all_gather_into_tensor(stacked.view(-1), given, group=self.group, async_op=True)
        return Pending(stacked, work, keeps=given)


def _flatten(tensor: Tensor) -> Tensor:
    return tensor.flatten(0, 1)


def label_rows(head_WD: Tensor, labels_R: Tensor, shard: VocabShard) -> Tensor:
    """Return the head's row of each label in float32 (or float64), [R, D]; zeros where this rank does not have it."""
    elsewhere_R = _is_elsewhere(labels_R, shard)
    rows_RD = head_WD[(labels_R - shard.first).masked_fill(elsewhere_R, 0)].to(statistics_dtype(head_WD))
    return rows_RD.masked_fill_(elsewhere_R[:, None], 0.0)


def label_logits(
    hidden_RD: Tensor, head_WD: Tensor, labels_R: Tensor, shard: VocabShard, extras: HeadExtras
) -> Tensor:
    """Return each label's logit, [R]; NaN where this rank does not have the label's row."""
    elsewhere_R = _is_elsewhere(labels_R, shard)
    logits_R = label_rows(head_WD, labels_R, shard).mul_(hidden_RD).sum(1)
    extras.apply(logits_R, (labels_R - shard.first).masked_fill(elsewhere_R, 0))
    return logits_R.masked_fill_(elsewhere_R, torch.nan)


def join_label_logits(logits: Tensor) -> Tensor:
    """Return each label's logit from the rank that has it, [ranks, R] -> [R]; NaN where none has it."""
    return logits.nansum(0).masked_fill_(logits.isnan().all(0), torch.nan)


def _is_elsewhere(labels_R: Tensor, shard: VocabShard) -> Tensor:
    return (labels_R < shard.first) | (labels_R >= shard.first + shard.num_valid)
