"""Is this the right teacher: the same tokenizer, and a sane loss on the first batch."""

from __future__ import annotations

import argparse
import math
import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_fdd import console
from megatron_fdd.convert.tokenizer import compare_tokenizers, has_tokenizer, tokenizer_identity
from megatron_fdd.lens import Lens
from megatron_fdd.ops.head_loss import masked_sum
from megatron_fdd.ops.linear_kl import VocabShard, linear_kl
from megatron_fdd.teacher import TeacherFeatures


def check_tokenizers(teacher_load: str, args: argparse.Namespace) -> None:
    """The data's tokenizer must be the teacher's; other added tokens and other padding are allowed.

    Args:
        teacher_load: checkpoint folder, with the tokenizer's files in `tokenizer/` if our conversion made it.
        args: this run's arguments (`--tokenizer-model`).

    Raises:
        ValueError: ids that mean different tokens.
    """
    stored = Path(teacher_load) / "tokenizer"
    model = Path(args.tokenizer_model) if args.tokenizer_model else None
    if not has_tokenizer(stored):
        _warn_once(
            f"--teacher-load {teacher_load} stores no tokenizer, so nobody checks that its ids mean what the "
            "data's ids mean; if they do not, the student learns noise (fdd import stores it)",
            args,
        )
        return
    if model is None or not has_tokenizer(_folder(model)):
        _warn_once(
            f"--tokenizer-type {args.tokenizer_type}: its vocabulary is not in files, so it cannot be compared "
            f"with the teacher's ({stored}); make sure that the ids mean the same",
            args,
        )
        return
    difference = compare_tokenizers(tokenizer_identity(stored), tokenizer_identity(_folder(model)))
    if difference is not None:
        raise ValueError(
            f"the teacher's tokenizer ({stored}) is not the data's (--tokenizer-model {model}): {difference}. "
            "Teacher and student must share a vocabulary: prepare the data with the teacher's tokenizer"
        )


def report_cross_entropy(
    features: TeacherFeatures, labels_N: Tensor, *, lens: Lens, shard: VocabShard, group: ProcessGroup
) -> None:
    """Log the teacher's cross-entropy on the first batch; warn loudly when a uniform guess would be better.

    Args:
        features: of that batch; its head is `lens.head_WH`.
        labels_N: of this rank's rows, negative where there is none.
        group: ranks whose rows differ.

    Collectives: those of `linear_kl` once; one all-reduce of two numbers over `group`, one of the vocabulary's
    size over the tensor-parallel group.

    Raises:
        ValueError: the cross-entropy is not finite. The same on every rank.
    """
    assert features.final_SBT is not None
    result = linear_kl(
        None,
        None,
        features.final_SBT.flatten(0, 1),
        lens.head_WH,
        shard=shard,
        divergence=None,
        labels_N=labels_N,
        needs_lse=False,
    )
    assert result.cross_entropy_N is not None
    counts_N = (labels_N >= 0).float()
    assert result.cross_entropy_N is not None
    sums = torch.stack([masked_sum(result.cross_entropy_N, counts_N), counts_N.sum()])
    torch.distributed.all_reduce(sums, group=group)
    vocab_size = shard.all_reduce(sums.new_tensor([shard.num_valid]))
    nats, uniform = float(sums[0] / sums[1].clamp(min=1)), math.log(vocab_size.item())
    if not math.isfinite(nats):
        raise ValueError(f"the teacher's cross-entropy on the first batch is {nats}: its weights are damaged")
    console.say(
        f"teacher cross-entropy on the first batch: {nats:.4f} nats per token (uniform: {uniform:.4f})"
    )
    if nats > uniform:
        console.say(
            f"WARNING: THE TEACHER IS WORSE THAN A UNIFORM GUESS ({nats:.4f} > {uniform:.4f} nats). "
            "Its weights, its tokenizer or its conversion is wrong; the student would learn that."
        )


def _folder(path: Path) -> Path:
    """A SentencePiece model is named by its file, everything else by its folder."""
    return path.parent if path.is_file() else path


def _warn_once(text: str, args: argparse.Namespace) -> None:
    if args.rank == 0:
        warnings.warn(text, stacklevel=3)
