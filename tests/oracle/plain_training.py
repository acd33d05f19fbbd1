"""Stock Megatron without distillation, for comparison: the same chunks, micro-batches and schedule."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_fdd.host.topology import Topology
from tests.oracle import reference
from tests.oracle.case import LENGTH, MICRO_BATCH, Case
from tests.oracle.models import build_student


def train_plainly(case: Case) -> None:
    """Run, on every rank, one step with cross-entropy only, through the model's own head."""
    topology = Topology.from_megatron(sequence_parallel=case.sequence_parallel)
    dtype = torch.bfloat16 if case.bf16 else torch.float32
    chunks = build_student(case.student, reference.random_weights(case.student, 1), topology, dtype)
    batches = reference.random_batches(case.micro_batches, MICRO_BATCH, LENGTH, case.student.vocab)
    get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=iter(batches),
        model=chunks,
        num_microbatches=len(batches),
        seq_length=LENGTH,
        micro_batch_size=MICRO_BATCH,
        forward_only=False,
    )


def _forward_step(data_iterator: Iterator[dict[str, Tensor]], model: torch.nn.Module) -> Any:
    batch = next(data_iterator)
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

    def loss(loss_BS: Tensor) -> tuple[Tensor, Tensor, dict]:
        return (loss_BS * batch["loss_mask"]).sum(), batch["loss_mask"].sum().int(), {}

    return output, loss
