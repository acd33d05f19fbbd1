"""Datasets that a training script brings: their lengths, compared before the first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from megatron.training import get_args

from megatron_fdd.host.together import together

Lengths = Sequence[int | None]
_NAMES = ("training", "validation", "test")


def with_checked_lengths(provider: Callable[..., Sequence[Any]]) -> Callable[..., Sequence[Any]]:
    """Return a provider of the same datasets that refuses other lengths on other ranks, and too few samples.

    The new provider raises ValueError, the same on every rank. Its collectives: two all-gathers over all ranks, of
    errors and of the lengths.

    Args:
        provider: makes the training, validation and test dataset; any may be None.
    """

    def provide(num_samples: Lengths, vp_stage: int | None = None) -> Sequence[Any]:
        with together():
            datasets = _made(provider, num_samples, vp_stage)
            lengths = _lengths(datasets)
        by_rank: list[Lengths] = [()] * dist.get_world_size()
        dist.all_gather_object(by_rank, lengths)
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


def _made(
    provider: Callable[..., Sequence[Any]], num_samples: Lengths, vp_stage: int | None
) -> Sequence[Any]:
    """Call the script's function; refuse one that fails, or would end the process."""
    try:
        return provider(num_samples, vp_stage=vp_stage)
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"the script's `datasets` fails with {type(error).__name__}: {error}; make it give three datasets (a "
            "rank's log has the traceback)"
        ) from error


def _lengths(datasets: Any) -> Lengths:
    """Return the lengths of three datasets; refuse what is not three."""
    if not isinstance(datasets, Sequence) or len(datasets) != len(_NAMES):
        raise ValueError(
            f"the script's `datasets` returns {datasets!r}: it must give the {', '.join(_NAMES)} set, None for one "
            "that is not read (docs/extend/own-pretrain.md)"
        )
    return [_length(dataset) for dataset in datasets]


def _length(dataset: Any) -> int | None:
    return len(dataset) if hasattr(dataset, "__len__") else None
