"""One micro-batch on the device: this rank's part of the sequence."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import flatten_batch_for_packed_sequences, get_batch_on_this_cp_rank
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_fdd.data.store.taught import FEATURES, TEACHER

# B micro-batch (1 when packed), S sequence (this context-parallel rank's part)


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch; every stage and every tensor-parallel rank reads its own.

    Attributes:
        tokens_BS, labels_BS, position_ids_BS: int64.
        loss_mask_BS: float32, 1 where the label counts.
        token_mask_BS: float32, 1 where the input is a token, not padding (`--fdd-tokens all`).
        attention_mask: None for causal attention; bool [B, 1, S, whole sequence], true where attention is
            forbidden, with `--reset-attention-mask`.
        packed: where documents begin, when attention stays inside each document
            (`--dataloader-inter-document-masking`); the whole micro-batch is then one row.
        teacher_features: packed features of a stored teacher (`data/store/taught.py`), uint8 [B, K, R, P] of this
            rank's R positions; when packed, [samples, K, sequence, P] of the whole row. With several teachers uint8
            [samples, bytes], each sample's own [K, R, P] first (`data/store/routed.py`).
        teachers: the number of each sample's teacher, on the host; None where the run has one.
    """

    tokens_BS: Tensor
    labels_BS: Tensor
    position_ids_BS: Tensor
    loss_mask_BS: Tensor
    token_mask_BS: Tensor
    attention_mask: Tensor | None = None
    packed: PackedSeqParams | None = None
    teacher_features: Tensor | None = None
    teachers: tuple[int, ...] | None = None


# What a sample has, and so a batch.
_MASKS = ("loss_mask", "token_mask")
_ENTRIES = ("tokens", "labels", "position_ids", *_MASKS)
_OPTIONAL = ("attention_mask", "cu_seqlens", "max_seqlen")


@dataclass(slots=True)
class Wait:
    """The time that a step has waited for its batches, in seconds."""

    seconds: float = 0.0


def checked_batches(data_iterator: Any, vocab_size: int, length: int, iteration: int, wait: Wait) -> Any:
    """Return an iterator over the same batches that refuses other shapes, odd masks or positions, and unknown ids.

    A prepared set is checked as a whole before training; this is for data that nothing describes. The host looks:
    batches that lie on a device already would make it wait.

    Args:
        data_iterator: Megatron's; a list of them with virtual stages.
        vocab_size: number of ids that tokenizer, teacher and student share.
        length: tokens of a sample.
        iteration: number of steps that are done.
        wait: gets the time that each batch takes to arrive.
    """
    if isinstance(data_iterator, list):
        return [checked_batches(each, vocab_size, length, iteration, wait) for each in data_iterator]
    return _CheckedBatches(data_iterator, vocab_size, length, iteration, wait)


class _CheckedBatches:
    """An iterator without `__iter__`, as Megatron's own are."""

    def __init__(
        self,
        batches: Iterator[Mapping[str, Tensor]],
        vocab_size: int,
        length: int,
        iteration: int,
        wait: Wait,
    ) -> None:
        self._batches, self._vocab_size, self._iteration = batches, vocab_size, iteration
        self._length = length
        self._wait = wait

    def __next__(self) -> Mapping[str, Tensor]:
        """Return the next batch.

        Raises:
            ValueError: there is no batch, an entry is missing or of another shape or kind, a mask is no weight, an id
                is unknown, or what the data sets raise; on the ranks that read it.
        """
        started_s = time.perf_counter()
        try:
            batch = next(self._batches, None)
        except ValueError as error:
            raise ValueError(_said_by_worker(str(error), self._iteration + 1)) from error
        self._wait.seconds += time.perf_counter() - started_s
        if batch is None:
            raise ValueError(
                f"iteration {self._iteration + 1}: the data have no batch left on this rank; give as many samples as "
                "the run reads, the same on every rank"
            )
        iteration = self._iteration + 1
        _check_entries(batch, self._length, iteration)
        _check_masks(batch, iteration)
        _check_ids(batch, self._vocab_size, iteration)
        _check_positions(batch["position_ids"], iteration)
        return batch


def _check_entries(batch: Mapping[str, Tensor], length: int, iteration: int) -> None:
    """Refuse a batch of which an entry is missing, has another shape than [samples, length], or is of another kind."""
    missing = [name for name in _ENTRIES if name not in batch]
    if missing:
        raise ValueError(
            f"a sample of the data has no {', '.join(missing)}; give each of {', '.join(_ENTRIES)} "
            "(docs/extend/own-pretrain.md)"
        )
    num_samples = len(batch["tokens"])
    for name in _ENTRIES:
        if batch[name].shape != (num_samples, length):
            raise ValueError(
                f"iteration {iteration}: {name} of a batch is {[*batch[name].shape]}, and --seq-length is {length}: "
                f"each entry must be [samples, {length}], padded where both masks are 0 (docs/extend/own-pretrain.md)"
            )
        if name not in _MASKS and batch[name].dtype.is_floating_point:
            raise ValueError(
                f"iteration {iteration}: {name} of a batch is {batch[name].dtype}; give whole numbers, as "
                ".long() makes them"
            )


def _check_masks(batch: Mapping[str, Tensor], iteration: int) -> None:
    """Refuse masks that are no weights: a negative one would teach the opposite."""
    for name in _MASKS:
        for found in (float(each) for each in batch[name].aminmax()):
            if not 0 <= found < math.inf:
                raise ValueError(
                    f"iteration {iteration}: {name} of a batch has the value {found:g}; give 1 where it "
                    "counts, 0 elsewhere"
                )


def _check_ids(batch: Mapping[str, Tensor], vocab_size: int, iteration: int) -> None:
    """Refuse ids that not all models have, where they are read."""
    for name, ids in (("token", batch["tokens"]), ("label", batch["labels"][batch["loss_mask"] > 0])):
        if not ids.numel():
            continue
        for found in (int(each) for each in ids.aminmax()):
            if not 0 <= found < vocab_size:
                raise ValueError(
                    f"iteration {iteration}: a batch has the {name} {found}, and tokenizer, teacher and student "
                    f"share the ids 0 to {vocab_size - 1}; give data with these alone (where loss_mask is 0 a "
                    "label may be anything, a token may not)"
                )


def _check_positions(positions: Tensor, iteration: int) -> None:
    """Refuse positions beyond the sample: learned ones may have no row, and rotary ones count the tokens themselves."""
    most = positions.shape[1] - 1
    wrong = ((positions < 0) | (positions > most)).nonzero()
    if len(wrong):
        sample, place = wrong[0].tolist()
        raise ValueError(
            f"iteration {iteration}: sample {sample} of a batch has the position {int(positions[sample, place])} in "
            f"position_ids, and --seq-length leaves 0 to {most}; give positions that count the tokens of each sample"
        )


def _said_by_worker(message: str, iteration: int) -> str:
    """Return the message of an error of a loader, with the iteration that needs the batch.

    torch gives that of a worker with the worker's traceback around it.
    """
    if message.startswith("Caught "):
        found = re.search(r"^[\w.]*Error: (?!.*^[\w.]*Error: )(.+)", message, re.DOTALL | re.MULTILINE)
        message = found[1].strip() if found else message
    return f"iteration {iteration}: {message}"


def read_ahead(*, data_iterator: Any, num_microbatches: int, **_: Any) -> tuple[list[dict[str, Tensor]], Any]:
    """Return the step's batches, and iterators over them to replace Megatron's (one per chunk with virtual stages)."""
    if not isinstance(data_iterator, list):
        batches = [next(data_iterator) for _ in range(num_microbatches)]
        return batches, iter(batches)
    # Every chunk has a loader of its own over the same samples; all must advance equally.
    by_chunk = [[next(iterator) for _ in range(num_microbatches)] for iterator in data_iterator]
    return by_chunk[0], [iter(batches) for batches in by_chunk]


def peek(data_iterator: Any) -> tuple[list[dict[str, Tensor]], Any]:
    """Return the step's first batch, and iterators that still have it."""
    if isinstance(data_iterator, list):
        first, head = peek(data_iterator[0])
        return first, [head, *data_iterator[1:]]
    batch = next(data_iterator)
    return [batch], chain([batch], iter(lambda: next(data_iterator), None))


def get_batch(
    data_iterator: Iterator[Mapping[str, Tensor]],
    device: torch.device | str | int,
    context_group: ProcessGroup | None = None,
) -> Batch:
    """Move this rank's part of the next micro-batch to `device`.

    The iterator's dict is not changed: Megatron may return the same dict again (it re-runs steps). With C
    context-parallel ranks, each has two of 2 C equal pieces of the sequence (Megatron's zig-zag). Collectives:
    none.
    """
    whole = next(data_iterator)
    features, teachers = whole.get(FEATURES), whole.get(TEACHER)  # this rank's own already
    # Megatron cuts all that it is given along the sequence, and a blend adds the number of the data set.
    sample = {name: whole[name] for name in (*_ENTRIES, *_OPTIONAL) if name in whole}
    boundaries = None
    if "cu_seqlens" in sample:
        sample["token_mask"] = sample["token_mask"].reshape(1, -1)
        sample = flatten_batch_for_packed_sequences(sample)
        boundaries = (sample.pop("cu_seqlens")[0], int(sample.pop("max_seqlen")))
    if context_group is not None:
        sample = get_batch_on_this_cp_rank(sample, is_hybrid_cp=False, cp_group=context_group)

    def to_device(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    return Batch(
        tokens_BS=to_device(sample["tokens"]),
        labels_BS=to_device(sample["labels"]),
        position_ids_BS=to_device(sample["position_ids"]),
        loss_mask_BS=to_device(sample["loss_mask"]),
        token_mask_BS=to_device(sample["token_mask"]),
        attention_mask=to_device(sample["attention_mask"]) if "attention_mask" in sample else None,
        packed=None if boundaries is None else _packed(to_device(boundaries[0]), boundaries[1]),
        teacher_features=None if features is None else to_device(features),
        teachers=None if teachers is None else tuple(teachers.tolist()),
    )


def _packed(boundaries: Tensor, longest: int) -> PackedSeqParams:
    """Return Megatron's carrier of document boundaries, int32 [documents + 1]."""
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
