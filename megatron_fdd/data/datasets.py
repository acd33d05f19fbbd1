"""Megatron datasets whose samples have a second mask, which tells tokens from padding.

Every sample has `tokens`, `labels`, `position_ids` (int64 [S]), `loss_mask` and `token_mask` (float32 [S]).
`loss_mask` is 1 where the label counts, `token_mask` where the input is not padding. Prompts and, with
`--eod-mask-loss`, ends of documents have a token but no loss; `--fdd-tokens all` must be able to tell them from
padding.

Why this is not Megatron's own `--sft` dataset: that one tokenises while training, knows two prompt formats by name
instead of the tokenizer's chat template, needs one more package, finds padding by its token id (which is often the
id that ends a turn, so that closing tokens lose their loss), and always packs (here: packing.py, on request).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.object_storage_utils import is_object_storage_path
from megatron.core.datasets.utils import Split

from megatron_fdd.data.prepared import content_identity, mask_prefix, set_kind

Sample = dict[str, torch.Tensor]
# Stands at padded positions. Any id that the embedding has would do: the masks say that it does not count, and
# with causal attention no real position sees what lies to its right.
PADDING_ID = 0
# Megatron's own padding value for a tokenizer without a padding token: no document can hold it.
_NO_TOKEN_ID = -1


def cache_name(prefix: str) -> str:
    """Return the dataset's name in Megatron's index cache: its place and its content.

    Megatron's cache key holds only the path, so a set that was prepared again at the same place would be read with
    the old set's index.
    """
    return prefix if is_object_storage_path(prefix) else f"{prefix} {content_identity(prefix)}"


def _with_token_mask(dataset: GPTDataset, sample: Sample, idx: int) -> Sample:
    """Add `token_mask` to a sample of a GPTDataset, by Megatron's own notion of padding.

    Megatron has replaced padding by token 0 in the sample, but not in the text. The text is therefore read a second
    time; its page is in memory already.
    """
    text, _, _ = dataset._query_document_sample_shuffle_indices(idx)
    inputs = torch.from_numpy(text)[: sample["tokens"].numel()]
    mask = (inputs != dataset._pad_token_id).to(torch.float32)
    return {**sample, "token_mask": mask}


class _PaddedDataset(GPTDataset):
    """A GPTDataset that also works for tokenizers without a padding token, where Megatron's would pad with None."""

    _pad_token_id: int | None

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        if self._pad_token_id is None:
            self._pad_token_id = _NO_TOKEN_ID


class TextDataset(_PaddedDataset):
    """Plain text: Megatron's GPTDataset with `token_mask`, cached under its content."""

    def __init__(
        self,
        indexed_dataset: IndexedDataset,
        dataset_path: str,
        indexed_indices: np.ndarray,
        num_samples: int | None,
        index_split: Split,
        config: GPTDatasetConfig,
    ) -> None:
        super().__init__(
            indexed_dataset, cache_name(dataset_path), indexed_indices, num_samples, index_split, config
        )

    def __getitem__(self, idx: int) -> Sample:
        return _with_token_mask(self, super().__getitem__(idx), idx)

    def document_at(self, idx: int, position: int) -> int:
        """Return the number of the document to which a position of a sample belongs, in the set's files."""
        place, offset = (int(each) for each in self.sample_index[int(self.shuffle_index[idx])])
        left = offset + position
        while left >= (length := int(self.dataset.sequence_lengths[self.document_index[place]])):
            left, place = left - length, place + 1
        return int(self.document_index[place])


class MockTextDataset(_PaddedDataset, MockGPTDataset):
    """`--mock-data`: Megatron's made-up text with `token_mask`."""

    def __getitem__(self, idx: int) -> Sample:
        return _with_token_mask(self, super().__getitem__(idx), idx)


class InstructionSet:
    """Token ids and loss masks of a prepared instruction set, document by document."""

    def __init__(self, prefix: str, mmap: bool) -> None:
        self.path_prefix = prefix
        self.ids = IndexedDataset(prefix, mmap=mmap)
        self.masks = IndexedDataset(mask_prefix(prefix), mmap=mmap)
        self.lengths = self.ids.sequence_lengths

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.ids[index], self.masks[index]

    def document_of(self, index: int) -> int:
        """Return the number of a document in the set's files."""
        return index


def piece_counts(lengths: np.ndarray, sequence_length: int) -> np.ndarray:
    """Return into how many pieces documents of so many ids are cut; one without a label gives none."""
    return np.maximum(-(-(lengths.astype(np.int64) - 1) // sequence_length), 0)


class DocumentSet:
    """Token ids and loss masks of plain text, piece by piece: documents are cut once, whatever is read of them.

    A piece has at most one id more than a sequence, which is the last one's label and begins the next piece.
    """

    def __init__(self, prefix: str, mmap: bool, sequence_length: int) -> None:
        self.path_prefix = prefix
        self._documents = IndexedDataset(prefix, mmap=mmap)
        self._length = sequence_length
        lengths = self._documents.sequence_lengths.astype(np.int64)
        counts = piece_counts(lengths, sequence_length)
        self._document = np.repeat(np.arange(len(lengths)), counts)
        self._first = (
            np.arange(len(self._document)) - np.repeat(np.cumsum(counts) - counts, counts)
        ) * sequence_length
        self.lengths = np.minimum(lengths[self._document] - self._first, sequence_length + 1)

    def __len__(self) -> int:
        return len(self._document)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        first, count = int(self._first[index]), int(self.lengths[index])
        ids = self._documents.get(self.document_of(index), offset=first, length=count)
        return ids, np.ones(count, np.uint8)

    def document_of(self, index: int) -> int:
        """Return the number of the document of which a piece is, in the set's files."""
        return int(self._document[index])


class InstructionDataset(MegatronDataset):
    """A dataset with one instruction, or piece of a document, in each sample, padded on the right.

    With padding on the right and causal attention no attention mask is needed. All epochs are shuffled by the seed
    alone, so every rank has the same order without a file or a collective.
    """

    def __init__(
        self,
        dataset: InstructionSet | DocumentSet,
        dataset_path: str,
        indices: np.ndarray,
        num_samples: int | None,
        index_split: Split,
        config: GPTDatasetConfig,
    ) -> None:
        super().__init__(dataset, cache_name(dataset_path), indices, num_samples, index_split, config)
        self._order: Sequence[Any] | np.ndarray = self._arrange(num_samples)

    def _arrange(self, num_samples: int | None) -> Sequence[Any] | np.ndarray:
        """Return what each sample holds, over as many whole epochs as are needed."""
        epochs = 1 if num_samples is None else max(1, -(-num_samples // len(self.indices)))
        return np.concatenate([self._shuffled(epoch) for epoch in range(epochs)])

    def _shuffled(self, epoch: int) -> np.ndarray:
        """Return this part's instructions in the order of an epoch."""
        seed = (self.config.random_seed, self.index_split.value, epoch)
        return np.random.default_rng(seed).permutation(self.indices)

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: InstructionSet | DocumentSet) -> int:
        """Return the number of instructions (Megatron's hook)."""
        return len(low_level_dataset)

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: GPTDatasetConfig) -> InstructionSet | DocumentSet:
        """Open an instruction set, or text whose documents take the place of instructions (Megatron's hook)."""
        if set_kind(dataset_path) == "instruction":
            return InstructionSet(dataset_path, config.mmap_bin_files)
        return DocumentSet(dataset_path, config.mmap_bin_files, config.sequence_length)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, idx: int) -> Sample:
        ids, mask = self.dataset[int(self._order[idx])]
        return instruction_sample(ids, mask, self.config.sequence_length)

    def document_at(self, idx: int, _position: int) -> int:
        """Return the number of the document that a sample holds, in the set's files."""
        return self.dataset.document_of(int(self._order[idx]))


def instruction_sample(ids: np.ndarray, mask: np.ndarray, sequence_length: int) -> Sample:
    """Shift and pad one instruction; L ids give L - 1 pairs of input and label."""
    count = max(0, len(ids) - 1)
    assert count <= sequence_length, f"{len(ids)} tokens in a sample of {sequence_length}"
    tokens = torch.full((sequence_length,), PADDING_ID, dtype=torch.int64)
    labels = tokens.clone()
    loss_mask = torch.zeros(sequence_length, dtype=torch.float32)
    token_mask = torch.zeros(sequence_length, dtype=torch.float32)
    # Copies, because the indexed dataset returns read-only memory of the file.
    tokens[:count] = torch.from_numpy(ids[:-1].astype(np.int64))
    labels[:count] = torch.from_numpy(ids[1:].astype(np.int64))
    loss_mask[:count] = torch.from_numpy(mask[1:].astype(np.float32))
    token_mask[:count] = 1.0
    return {
        "tokens": tokens,
        "labels": labels,
        "loss_mask": loss_mask,
        "token_mask": token_mask,
        "position_ids": torch.arange(sequence_length, dtype=torch.int64),
    }
