"""Build the teacher from its checkpoint, and refuse one that is not whole or not sane."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.training.models.gpt import GPTModelBuilder
from torch.distributed import ReduceOp

from megatron_fdd.arguments import model_config
from megatron_fdd.checkpoint import DAMAGE, cause_of
from megatron_fdd.topology import Topology

# What a training checkpoint holds beside the weights.
_NOT_WEIGHTS = ("optimizer", "chained_", "rng_state", "rerun_state_machine", "opt_param_scheduler")


def build_teacher(args: argparse.Namespace, checkpoint: Path, topology: Topology) -> GPTModel:
    """A frozen GPTModel in evaluation mode with the weights of `checkpoint`, at this run's layout.

    Random state is as it was before the call.

    Args:
        args: from `teacher_args`.

    Collectives: those of `dist_checkpointing.load`; one all-reduce over the tensor-parallel group.

    Raises:
        ValueError: a weight of the checkpoint is not used, one of the model is not filled, is all zero, or
            is not finite. The same on every rank.
    """
    tracker = get_cuda_rng_tracker()
    states, seed_state = tracker.get_states(), torch.get_rng_state()
    builder = GPTModelBuilder(model_config(args))
    model = builder.build_model(topology.collection)
    tracker.set_states(states)
    torch.set_rng_state(seed_state)
    model.to(device=torch.cuda.current_device(), dtype=args.params_dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # rows that only this run pads are in no checkpoint
    _load_weights(model, checkpoint)
    _check_weights(model, checkpoint, topology)
    return model.eval().requires_grad_(False)


def _load_weights(model: GPTModel, checkpoint: Path) -> None:
    metadata = dist_checkpointing.load_content_metadata(str(checkpoint))
    request = {"model": model.sharded_state_dict(metadata=metadata)}
    try:
        state, missing, unexpected = dist_checkpointing.load(request, str(checkpoint), strict="return_all")
    except DAMAGE as error:
        raise ValueError(
            f"--teacher-load {checkpoint}: its weights are not those that its own arguments describe, "
            f"or are damaged ({cause_of(error)}); convert or copy it again"
        ) from error
    unused = _weights_only(missing)
    unfilled = _weights_only(unexpected)
    if unused or unfilled:
        raise ValueError(
            f"--teacher-load {checkpoint}: the checkpoint and the model that its own arguments describe differ. "
            f"In the checkpoint but not used: {_listing(unused)}. In the model but not filled: {_listing(unfilled)}."
        )
    model.load_state_dict(state["model"], strict=True)


def _weights_only(keys: Iterable[str]) -> list[str]:
    """Leave out optimizer and other training state, empty extra state, and multi-token prediction (never built)."""
    return sorted(
        key
        for key in keys
        if not key.startswith((*_NOT_WEIGHTS, "mtp.")) and not key.endswith("_extra_state")
    )


def _listing(keys: list[str], limit: int = 8) -> str:
    if not keys:
        return "none"
    return ", ".join(keys[:limit]) + (f" and {len(keys) - limit} more" if len(keys) > limit else "")


def _check_weights(model: GPTModel, checkpoint: Path, topology: Topology) -> None:
    """No weight may be all zero over its shards, or hold a value that is not finite."""
    names, sizes = [], []
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:  # a bias may well be zero
            names.append(name)
            sizes.append(parameter.detach().abs().sum(dtype=torch.float32))
    magnitude = torch.stack(sizes)
    torch.distributed.all_reduce(magnitude, op=ReduceOp.SUM, group=topology.tensor_group)
    values = magnitude.tolist()
    zero = [name for name, value in zip(names, values, strict=True) if value == 0]
    broken = [
        name for name, value in zip(names, values, strict=True) if value != value or value == float("inf")
    ]
    if zero or broken:
        raise ValueError(
            f"--teacher-load {checkpoint}: this teacher cannot teach. "
            f"Weights that are all zero: {_listing(zero)}. Not finite: {_listing(broken)}. Convert it again."
        )
