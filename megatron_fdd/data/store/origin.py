"""Where units come from: the set and the document of one, and what tells the data of two runs apart."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from megatron.core.datasets.blended_dataset import BlendedDataset

from megatron_fdd.data.datasets import InstructionDataset, TextDataset
from megatron_fdd.data.full_validation import FilledDataset
from megatron_fdd.data.store.coverage import Source, Unit
from megatron_fdd.data.store.routed import PickedSamples

# Another one for another way to make samples of a set.
_VERSION = 1
# What decides the samples of a set beside what Megatron names in its own cache.
_OF_CONFIG = ("inter_document_masking", "eod_mask_loss", "allow_ambiguous_pad_tokens")
_ENDS = (".bin", ".idx")


def whereabouts(source: Source, unit: Unit) -> str:
    """Say where a unit comes from: its sample, and the document and the files of a set of ours."""
    place = f"{source.name} sample {unit.sample}, tokens {unit.first} to {unit.last - 1}"
    dataset, sample = _unfilled(source), unit.sample
    if isinstance(source.dataset, PickedSamples):
        sample = int(source.dataset.numbers[sample])
        place = f"{source.name} sample {sample}, tokens {unit.first} to {unit.last - 1}"
    if isinstance(dataset, BlendedDataset):
        number, sample = int(dataset.dataset_index[sample]), int(dataset.dataset_sample_index[sample])
        dataset = dataset.datasets[number]
    if not isinstance(dataset, InstructionDataset | TextDataset):
        return place
    document = dataset.document_at(sample, unit.first)
    return f"{place} (document {document} of {dataset.dataset.path_prefix})"


def identity_of_data(sources: Sequence[Source]) -> str | None:
    """Return a hash of all that decides the units of a run; None for data whose content nothing tells.

    Those are made-up text, sets in object storage, and a training script's own.
    """
    parts: list[object] = [_VERSION, version("megatron-core")]
    for source in sources:
        dataset, inner = _unfilled(source), _inner(source)
        if not all(isinstance(each, InstructionDataset | TextDataset) for each in inner):
            return None
        parts += [source.num_samples, dataset.unique_description]
        if isinstance(source.dataset, PickedSamples):
            parts.append(source.dataset.digest)
        for each in inner:
            try:
                parts.append(_state_of(each))
            except OSError:
                return None
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def cuts_rows(sources: Sequence[Source]) -> bool:
    """Whether a run reads rows of text, which depend on its seed and length, and not documents alone."""
    return not all(isinstance(each, InstructionDataset) for source in sources for each in _inner(source))


def _state_of(dataset: Any) -> list[object]:
    """Return what decides a set's samples, and changes when its files do.

    Raises:
        OSError: the files are no files of this machine.
    """
    states = [os.stat(dataset.dataset.path_prefix + end) for end in _ENDS]
    flags = [getattr(dataset.config, name) for name in _OF_CONFIG]
    return [dataset.dataset.path_prefix, flags, [(state.st_size, state.st_mtime_ns) for state in states]]


def _inner(source: Source) -> list[Any]:
    """Return the sets of a blend, or the one set."""
    dataset = _unfilled(source)
    return list(dataset.datasets) if isinstance(dataset, BlendedDataset) else [dataset]


def _unfilled(source: Source) -> Any:
    """Return the dataset behind the choice of some samples, and behind the filler of `--full-validation`."""
    dataset = source.dataset
    if isinstance(dataset, PickedSamples):
        dataset = dataset.dataset
    return dataset.filled if isinstance(dataset, FilledDataset) else dataset
