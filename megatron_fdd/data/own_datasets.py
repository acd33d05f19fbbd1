"""Datasets that a training script brings: their lengths, compared before the first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from megatron.training import get_args

Lengths = Sequence[int | None]
_NAMES = ("training", "validation", "test")


def with_checked_lengths(provider: Callable[..., Sequence[Any]]) -> Callable[..., Sequence[Any]]:
    """Return a provider of the same datasets that refuses other lengths on other ranks, and too few samples.

    The new provider raises ValueError, the same on every rank. Its collectives: one all-gather of the lengths over all
    ranks.

    Args:
        provider: makes the training, validation and test dataset; any may be None.
    """

    def provide(num_samples: Lengths, vp_stage: int | None = None) -> Sequence[Any]:
        datasets = provider(num_samples, vp_stage=vp_stage)
        by_rank: list[Lengths] = [()] * dist.get_world_size()
        dist.all_gather_object(by_rank, [_length(dataset) for dataset in datasets])
        reads_once = get_args().dataloader_type == "single"
        check_lengths(by_rank, num_samples if reads_once else (None,) * len(num_samples))
        return datasets

    return provide


def check_lengths(by_rank: Sequence[Lengths], num_samples: Lengths) -> None:
    """Refuse datasets that differ in length between ranks, or that end before the run.

    Args:
        by_rank: for each rank the lengths of its three datasets; None: no dataset, or one whose length nobody knows.
        num_samples: how many samples the run reads of each; None: of any number.

    Raises:
        ValueError: names the dataset, both numbers and the remedy.
    """
    for rank, lengths in enumerate(by_rank):
        for name, first, length in zip(_NAMES, by_rank[0], lengths, strict=True):
            if length != first:
                raise ValueError(
                    f"the script's {name} set has {first} samples on rank 0 and {length} on rank {rank}: `datasets` "
                    "must give the same on every rank, which reads its own part of it (docs/extend/own-pretrain.md)"
                )
    for name, length, number in zip(_NAMES, by_rank[0], num_samples, strict=True):
        if length is not None and number is not None and length < number:
            raise ValueError(
                f"the script's {name} set has {length} samples, and the run reads {number}: give it as many, such as "
                "each sample again and again, or shorten the run (docs/extend/own-pretrain.md)"
            )


def _length(dataset: Any) -> int | None:
    return len(dataset) if hasattr(dataset, "__len__") else None
