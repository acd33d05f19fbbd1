"""The gradients of trained copies of a lens, sent home from inner pipeline stages to the head and the final norm.

The stages that tap differentiate their copies. Their gradients are added to the owner's after Megatron's own
reduction: the last stage finishes first, and may already reduce while earlier stages still compute.

Shapes: head [W, H], norm weight and bias [H].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from megatron_fdd.host.layer_specs import final_norm_has_bias
from megatron_fdd.host.topology import Topology
from megatron_fdd.losses.lens import Lens


class TrainedLens:
    """The sum of this stage's lens gradients over a step, in float32, and its way to the owner of the lens.

    Args:
        sources: stages whose taps use a copy (the owner's stage is one if its chunks without the head tap); the same
            on every rank.
        with_norm: whether the lens has the final norm.
    """

    def __init__(self, sources: Sequence[int], topology: Topology, *, with_norm: bool) -> None:
        self._sources = list(sources)
        self._topology = topology
        self._num_tensors = None if with_norm else 1
        self._sums: list[Tensor] = []

    def open(self, lens: Lens) -> Lens:
        """Return the same values as leaves of this step's graphs; their gradients add up here."""
        norm = lens.norm
        tensors = [lens.head_WH] if norm is None else [lens.head_WH, norm.weight_H, norm.bias_H]
        present = [tensor.detach().requires_grad_() for tensor in tensors if tensor is not None]
        self._sums = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in present]
        for tensor, total in zip(present, self._sums, strict=True):
            tensor.register_post_accumulate_grad_hook(_move_gradient_to(total))
        if norm is None:
            return replace(lens, head_WH=present[0])
        bias_H = present[2] if len(present) == 3 else None
        return replace(lens, head_WH=present[0], norm=replace(norm, weight_H=present[1], bias_H=bias_H))

    @torch.no_grad()
    def send_home(self, model: GPTModel, num_tokens: Tensor) -> None:
        """Add the step's lens gradients to the owner's `main_grad`, and to the first stage's tied embedding.

        Args:
            model: this stage's chunk with the head, on the last stage; with the embedding, on the first.
            num_tokens: the step's divisor, which Megatron's reduction leaves here.

        Collectives: on each source one all-reduce of each tensor over the data-parallel group, and under sequence
        parallelism of the norm's tensors over the tensor-parallel group too; over the pipeline group one send of each
        tensor from each source to the owner and, with tied embeddings, one of the head from the owner to the first
        stage.
        """
        topology, group = self._topology, self._topology.pipeline_group
        owner = topology.num_stages - 1
        if topology.stage in self._sources:
            self._reduce()
            if topology.stage != owner:
                _exchange(dist.isend, self._sums, group, owner)
        tied = model.share_embeddings_and_output_weights
        if topology.stage == owner:
            parameters = _lens_parameters(model)[: self._num_tensors]
            totals = self._collect(parameters)
            for parameter, total in zip(parameters, totals, strict=False):
                parameter.main_grad.add_(total.div_(num_tokens.clamp(min=1)))  # type: ignore[attr-defined]
            if tied:
                _exchange(dist.isend, totals[:1], group, 0)
        elif topology.stage == 0 and tied:
            embedding = model.shared_embedding_or_output_weight()
            total = torch.empty_like(embedding, dtype=torch.float32)
            _exchange(dist.irecv, [total], group, owner)
            embedding.main_grad.add_(total)

    def _reduce(self) -> None:
        """Sum over the ranks that hold other tokens; not over those that hold other rows of the head."""
        for total in self._sums:
            dist.all_reduce(total, group=self._topology.collection.dp_cp)
        if self._topology.sequence_parallel:
            for total in self._sums[1:]:
                dist.all_reduce(total, group=self._topology.tensor_group)

    def _collect(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Receive the gradients of all sources on the owner; return their sum, with the owner's own chunks in it."""
        owner = self._topology.num_stages - 1
        totals = self._sums if owner in self._sources else []
        for source in self._sources:
            if source == owner:
                continue
            received = [torch.empty_like(each, dtype=torch.float32) for each in parameters]
            _exchange(dist.irecv, received, self._topology.pipeline_group, source)
            totals = received if not totals else [a.add_(b) for a, b in zip(totals, received, strict=True)]
        return totals


def _exchange(
    direction: Callable[..., Work | None], tensors: Sequence[Tensor], group: ProcessGroup, peer: int
) -> None:
    """Send tensors to a stage, or receive them, in one batch; single ones open a communicator for each pair in NCCL."""
    operations = [dist.P2POp(direction, tensor, group=group, group_peer=peer) for tensor in tensors]
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def _lens_parameters(model: GPTModel) -> list[Tensor]:
    """Return head, norm weight and, if it has one, norm bias of the model that owns them."""
    norm = model.decoder.final_layernorm
    head = (
        model.shared_embedding_or_output_weight()
        if model.share_embeddings_and_output_weights
        else model.output_layer.weight
    )
    bias = [norm.bias] if final_norm_has_bias(model.config) else []
    return [head, norm.weight, *bias]


def _move_gradient_to(total: Tensor) -> Callable[[Tensor], None]:
    """Return a hook that moves a leaf's gradient to `total`: sums of micro-batches in bf16 would round each time."""

    def move(tensor: Tensor) -> None:
        assert tensor.grad is not None
        total.add_(tensor.grad)
        tensor.grad = None

    return move
