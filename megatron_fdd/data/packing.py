"""Several instructions in one sample, each of which sees only itself (`--dataloader-inter-document-masking`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_fdd.data.datasets import InstructionDataset, Sample, instruction_sample


class PackedInstructionDataset(InstructionDataset):
    """A dataset with as many shuffled instructions in each sample as the sequence holds, followed by padding.

    Like those of Megatron's GPTDataset, its samples also have `cu_seqlens`, int32 [S + 1]: where each instruction
    and the padding begin, filled up with S; and `max_seqlen`, int32: the longest of them.
    """

    def _arrange(self, num_samples: int | None) -> list[np.ndarray]:
        # L ids give L - 1 pairs of input and label.
        pairs = np.maximum(self.dataset.lengths.astype(np.int64) - 1, 0)
        packs: list[np.ndarray] = []
        epoch = 0
        while not packs or len(packs) < (num_samples or 1):
            order = self._shuffled(epoch)
            packs += np.split(order, pack(pairs[order], self.config.sequence_length)[:-1])
            epoch += 1
        return packs

    def __getitem__(self, idx: int) -> Sample:
        documents = [self.dataset[int(index)] for index in self._order[idx]]
        return packed_sample(documents, self.config.sequence_length)

    def document_at(self, idx: int, position: int) -> int:
        """Return the number of the document to which a position of a sample belongs, in the set's files."""
        indices = self._order[idx]
        ends = np.cumsum(np.maximum(self.dataset.lengths[indices].astype(np.int64) - 1, 0))
        return self.dataset.document_of(int(indices[int(np.searchsorted(ends, position, side="right"))]))


def pack(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Return where each pack ends if documents fill packs in their order, each as full as possible.

    Args:
        lengths: one for each document, each at most `capacity`.
    """
    totals, ends, start = np.cumsum(lengths), [], 0
    while start < len(lengths):
        before = totals[start - 1] if start else 0
        start = int(np.searchsorted(totals, before + capacity, side="right"))
        ends.append(start)
    return np.array(ends)


def packed_sample(documents: Sequence[tuple[np.ndarray, np.ndarray]], sequence_length: int) -> Sample:
    """Return one sample that holds several instructions (ids, loss mask)."""
    lengths = [max(0, len(ids) - 1) for ids, _ in documents]
    lengths.append(sequence_length - sum(lengths))
    padding = (np.zeros(0, np.int64), np.zeros(0, np.uint8))
    parts = [
        instruction_sample(ids, mask, length)
        for (ids, mask), length in zip([*documents, padding], lengths, strict=True)
    ]
    boundaries = torch.full((sequence_length + 1,), sequence_length, dtype=torch.int32)
    starts = torch.tensor([0, *np.cumsum([length for length in lengths if length])], dtype=torch.int32)
    boundaries[: len(starts)] = starts
    return {
        **{name: torch.cat([part[name] for part in parts]) for name in parts[0]},
        "cu_seqlens": boundaries,
        "max_seqlen": torch.tensor(max(lengths), dtype=torch.int32),
    }
