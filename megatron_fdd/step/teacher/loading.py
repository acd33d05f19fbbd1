"""Construction of the teacher from its checkpoint, and the refusal of a checkpoint that is incomplete or damaged."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig
from torch import Tensor
from torch.distributed import ReduceOp

from megatron_fdd.host.listing import listing
from megatron_fdd.host.model import build_config, cap_own_logits
from megatron_fdd.host.topology import Topology
from megatron_fdd.host.weights import load_weights
from megatron_fdd.step.teacher.arguments import uses_delayed_scaling
from megatron_fdd.step.teacher.scales import freeze_scales


def build_teacher(args: argparse.Namespace, checkpoint: Path, topology: Topology) -> GPTModel:
    """Build a frozen GPTModel in evaluation mode with the weights of `checkpoint`, at this run's layout.

    In FP8 the matrices of its layers exist only in FP8; with delayed scaling they have the scales of `checkpoint`.

    The random state is unchanged after the call.

    Args:
        args: from `teacher_args`.
        topology: with the teacher's own expert groups (`Topology.with_experts`).

    Collectives: those of `dist_checkpointing.load`; one all-reduce over the tensor-parallel group, and one
    all-gather of names over all ranks (with delayed scaling two).

    Raises:
        ValueError: a weight of the checkpoint is not used; a weight of the model is not filled, all zero, or
            not finite; a layer gets no scales. Raised on every rank.
    """
    tracker = get_cuda_rng_tracker()
    states, seed_state = tracker.get_states(), torch.get_rng_state()
    with torch.no_grad():  # with gradients, weights in FP8 would have a second copy for the backward pass
        model = build_stage(build_config(args), topology)
        tracker.set_states(states)
        torch.set_rng_state(seed_state)
        model.to(device=torch.cuda.current_device(), dtype=args.params_dtype)
        for parameter in model.parameters():
            if not is_float8tensor(parameter):
                parameter.zero_()  # no checkpoint has the rows that only this run pads
    scaled = uses_delayed_scaling(args)
    weights = load_weights(model, checkpoint, "--teacher-load", topology.collection, with_scales=scaled)
    _check_weights(weights, checkpoint, topology)
    if scaled:
        freeze_scales(model, checkpoint)
    return model.eval().requires_grad_(False)


def build_stage(config: GPTModelConfig, topology: Topology) -> GPTModel:
    """Build this stage's part of a model that has no virtual stages, even if the student has some.

    A pipeline layout asks Megatron's globals whether there are virtual stages, and then for the index of one; this
    model has one chunk a stage.
    """
    has_layout = config.transformer.pipeline_model_parallel_layout is not None
    model = GPTModelBuilder(config).build_model(
        topology.collection,
        pre_process=topology.stage == 0,
        post_process=topology.is_last_stage,
        vp_stage=0 if has_layout else None,
    )
    return cap_own_logits([model])[0]


def _check_weights(weights: Mapping[str, Tensor], checkpoint: Path, topology: Topology) -> None:
    """Refuse a weight that is zero in all its shards, or holds a value that is not finite."""
    names, sizes = [], []
    for name, weight in sorted(weights.items()):
        if weight.dim() > 1:  # a bias may be zero
            names.append(name)
            sizes.append(weight.to(torch.cuda.current_device()).abs().sum(dtype=torch.float32))
    values: list[float] = []
    if sizes:  # a stage of a pipeline layout may hold no layer; its tensor-parallel ranks agree on that
        magnitude = torch.stack(sizes)
        torch.distributed.all_reduce(magnitude, op=ReduceOp.SUM, group=topology.tensor_group)
        values = magnitude.tolist()
    zero = [name for name, value in zip(names, values, strict=True) if value == 0]
    broken = [
        name for name, value in zip(names, values, strict=True) if value != value or value == float("inf")
    ]
    found: list[tuple[list[str], list[str]]] = [([], [])] * torch.distributed.get_world_size()
    # Stages and expert ranks hold different weights; a rank that stopped alone would leave the others waiting.
    torch.distributed.all_gather_object(found, (zero, broken))
    zero = sorted({name for names, _ in found for name in names})
    broken = sorted({name for _, names in found for name in names})
    if zero or broken:
        raise ValueError(
            f"--teacher-load {checkpoint}: this teacher cannot teach. "
            f"Weights that are all zero: {listing(zero)}. Not finite: {listing(broken)}. Convert it again."
        )
