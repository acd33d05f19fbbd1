"""The Megatron side of the conversion tests, for live ranks: models built in two ways, and their logits."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_fdd import convert
from megatron_fdd.convert.mcore_model import build_model
from megatron_fdd.host import rehearsal
from megatron_fdd.host.checkpoint import find_checkpoint, read_checkpoint_args
from megatron_fdd.host.model import build_config
from megatron_fdd.host.topology import Topology
from megatron_fdd.host.weights import load_weights
from megatron_fdd.step.teacher.loading import build_stage
from tests.convert import toys


def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return [batch, sequence, padded vocabulary] in float32, gathered over the tensor-parallel ranks."""
    length = tokens.shape[1]
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    positions = torch.arange(length)[None].expand_as(tokens)
    with torch.no_grad():
        return model.eval()(tokens, positions, mask, runtime_gather_output=True)


def from_own_args(load: Path, **changes: Any) -> tuple[torch.nn.Module, Namespace]:
    """Build a model from the checkpoint's args alone, as for a teacher, at the layout of the ranks."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups = ProcessGroupCollection.use_mpu_process_groups()
    checkpoint = find_checkpoint(str(load), "--load")
    args = read_checkpoint_args(checkpoint, "--load")
    size = groups.tp.size()
    sizes = {"tensor_model_parallel_size": size, "tensor_parallel_num_weight_shards": size}
    experts = groups.expt_tp.size()
    sizes |= {"expert_tensor_parallel_size": experts, "expert_tensor_parallel_num_weight_shards": experts}
    sizes |= {"expert_model_parallel_size": groups.ep.size()}
    vars(args).update(**sizes, **changes)
    model = build_model(args, groups)
    load_weights(model, checkpoint, "--load", groups)
    return model, args


def logits_of_stages(load: Path, tokens: torch.Tensor) -> torch.Tensor | None:
    """Build and load one pipeline stage of a model on each rank; return the logits on the last, in float32."""
    topology = Topology.from_megatron(sequence_parallel=False)
    checkpoint = find_checkpoint(str(load), "--load")
    args = read_checkpoint_args(checkpoint, "--load")
    args.pipeline_model_parallel_size = topology.num_stages
    args.decoder_first_pipeline_num_layers = 1  # where layers differ, so do the stages
    model = build_stage(build_config(args), topology).to(args.params_dtype)
    load_weights(model, checkpoint, "--load", topology.collection)
    model.float()
    if topology.stage > 0:
        hidden_SBH = torch.empty(tokens.shape[1], len(tokens), args.hidden_size)
        dist.recv(hidden_SBH, topology.stage - 1)
        model.set_input_tensor(hidden_SBH)
    output = logits(model, tokens)
    if topology.is_last_stage:
        return output
    dist.send(output.contiguous(), topology.stage + 1)
    return None


def from_stock_megatron(load: Path, flags: list[str]) -> tuple[torch.nn.Module, Namespace, int]:
    """Let megatron.training build and load a model by itself; return it with its args and iteration."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.models.gpt import GPTModelBuilder

    # In 0.19.2, --use-checkpoint-args does not restore the epsilon.
    flags = [*flags, "--use-checkpoint-args", "--norm-epsilon", str(toys.SHAPE["rms_norm_eps"])]
    flags += ["--load", str(load), "--micro-batch-size", "1", "--lr", "1e-3"]
    flags += ["--tensor-model-parallel-size", str(dist.get_world_size())]
    before, sys.argv = sys.argv, ["test", *rehearsal.add_flags(flags)]
    try:
        args = parse_and_validate_args()
    finally:
        sys.argv = before
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = GPTModelBuilder(gpt_config_from_args(args)).build_model(groups)
    iteration, _ = load_checkpoint([model], None, None)
    return model, args, iteration


def save(folder: Path, model: torch.nn.Module, args: Namespace) -> None:
    """Save a checkpoint of a model that is whole on the only rank."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_fdd.convert.checkpoint_entries import tensors_of
    from megatron_fdd.convert.mcore_checkpoint import save_model

    values = {name: tensor.detach() for name, tensor in tensors_of(model).items()}
    groups = ProcessGroupCollection.use_mpu_process_groups()
    folder.mkdir()
    save_model(folder, model, args, groups, list(values), lambda name: [values[name]])


def make_checkpoint(folder: Path, variant: str, **changes: Any) -> None:
    """Make `folder/source` (Hugging Face) and `folder/mcore` on the ranks of this run."""
    if dist.get_rank() == 0:
        toys.make_llama(folder / "source", variant, **changes)
    dist.barrier()
    convert.hf_to_mcore(folder / "source", folder / "mcore")
