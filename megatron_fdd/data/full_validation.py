"""`--full-validation`: a validation looks at every sample of its sets once, whatever the ranks and batch sizes.

Megatron's own sampler gives a rank every n-th sample, one at a time, and begins again where ranks have unequal numbers
of them or a step has several micro-batches: some samples count twice, others in the next validation. Here every rank
has equally many whole micro-batches, the last of them with filler that counts nowhere.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from megatron.core.datasets.utils import Split
from megatron.training import get_args
from torch.utils.data import Dataset, Sampler

from megatron_fdd.data.datasets import Sample
from megatron_fdd.host.patches.table import replaced

NO_TEST = (
    "--full-validation with test data: Megatron fails at the test, after the last step; leave out --mock-data and "
    "--test-data-path, and give the test part a share of 0 (--split 95,5,0)"
)


def check_full_validation(args: argparse.Namespace) -> None:
    """Refuse flags with which Megatron's validation of whole sets fails.

    Raises:
        ValueError: names the flags and the remedy.
    """
    if bool(args.full_validation) != bool(args.multiple_validation_sets):
        raise ValueError(
            "--full-validation and --multiple-validation-sets: this Megatron fails at the first validation with one of "
            "them alone; give both (one set is enough) or neither"
        )
    if args.full_validation and args.virtual_pipeline_model_parallel_size:
        raise ValueError(
            "--full-validation with virtual stages: Megatron takes the loaders of the stages for those of validation "
            "sets; use one of the two"
        )
    if args.full_validation and args.mock_data:
        raise ValueError(NO_TEST)


class FilledDataset(Dataset[Sample]):
    """A validation set with filler behind its last sample: without end, and with masks of zeros.

    `index_split` tells Megatron that it is a validation set.
    """

    index_split = Split.valid

    def __init__(self, dataset: Dataset[Sample] | Sequence[Sample]) -> None:
        self.filled: Any = dataset

    def __len__(self) -> int:
        return len(self.filled)

    def __getitem__(self, index: int) -> Sample:
        if index < len(self):
            return self.filled[index]
        sample = self.filled[0]
        return {**sample, **{name: torch.zeros_like(sample[name]) for name in ("loss_mask", "token_mask")}}


class WholeSetSampler(Sampler[list[int]]):
    """The micro-batches of one data-parallel rank, in place of Megatron's `MegatronFullValidationSampler`.

    Indices from `total_samples` on are filler.

    Raises:
        ValueError: the set has no sample.
    """

    def __init__(self, total_samples: int, data_parallel_rank: int, data_parallel_size: int) -> None:
        args = get_args()
        if total_samples == 0:
            raise ValueError(
                f"--full-validation: a validation set has fewer tokens than one sample of --seq-length "
                f"{args.seq_length}; give it more text, or lower --seq-length"
            )
        self._rows = args.eval_micro_batch_size
        self._first, self._stride = data_parallel_rank * self._rows, data_parallel_size * self._rows
        self._step = args.eval_global_batch_size
        self._num_steps = -(-total_samples // self._step)

    def __len__(self) -> int:
        """Return the number of steps of a validation, for which Megatron takes the length of a loader."""
        return self._num_steps

    def __iter__(self) -> Iterator[list[int]]:
        for first in range(self._first, self._num_steps * self._step, self._stride):
            yield list(range(first, first + self._rows))


def with_filler(provider: Callable[..., Sequence[Any]]) -> Callable[..., list[Any]]:
    """Return a provider of the same datasets, with filler behind the validation sets.

    The new provider raises ValueError if there is a test set.
    """

    def provide(num_samples: Sequence[int | None], vp_stage: int | None = None) -> list[Any]:
        train, valid, test = provider(num_samples, vp_stage=vp_stage)
        if test is not None:
            raise ValueError(NO_TEST)
        if isinstance(valid, list):
            return [train, [FilledDataset(each) for each in valid], None]
        return [train, None if valid is None else FilledDataset(valid), None]

    return provide


def installed() -> AbstractContextManager[None]:
    """Replace Megatron's sampler of whole validation sets in a `with` block."""
    return replaced(
        {"megatron.training.datasets.data_samplers.MegatronFullValidationSampler": WholeSetSampler}
    )
