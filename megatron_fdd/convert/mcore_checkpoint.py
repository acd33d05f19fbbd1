"""Ordinary Megatron `torch_dist` checkpoints: writing one of a model alone, and what one says of its model."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:  # importing Megatron takes seconds, and a rehearsal starts before it
    from megatron.core.transformer.module import MegatronModule


def save_model(folder: Path, model: MegatronModule, args: Namespace, groups: Any) -> None:
    """Write the folder `release` and the tracker file that make `folder` loadable with `--load`.

    Collectives: those of `dist_checkpointing.save` over all ranks.
    """
    from megatron.core import dist_checkpointing

    from megatron_fdd.checkpoint import RELEASE, TRACKER_FILE

    rank_zero = torch.distributed.get_rank() == 0
    target = folder / RELEASE
    if rank_zero:
        target.mkdir()
    metadata = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    state = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "model": model.sharded_state_dict(metadata={**metadata, "dp_cp_group": groups.dp_cp}),
    }
    torch.distributed.barrier()
    dist_checkpointing.save(state, str(target), content_metadata=metadata)
    if rank_zero:
        (folder / TRACKER_FILE).write_text(RELEASE)


def check_architecture(args: Namespace, fixed: Mapping[str, Any], model_type: str) -> None:
    """ValueError unless the checkpoint's args have the values that all models of a family have."""
    wrong = {name: getattr(args, name, value) for name, value in fixed.items()}
    wrong = {name: value for name, value in wrong.items() if value != fixed[name]}
    if wrong:
        told = ", ".join(f"{name} = {value!r} (needs {fixed[name]!r})" for name, value in wrong.items())
        raise ValueError(f"the checkpoint's model is not of the shape of a {model_type}: {told}")


def stored_layout(folder: Path) -> tuple[torch.dtype, int]:
    """Dtype of the weights in a checkpoint, and its number of vocabulary rows with padding.

    Raises:
        ValueError: it holds no GPT model.
    """
    from megatron.core import dist_checkpointing

    stored = dist_checkpointing.load_tensors_metadata(str(folder)).get("embedding.word_embeddings.weight")
    if stored is None:
        raise ValueError(f"{folder} holds no GPT model: it has no embedding.word_embeddings.weight")
    return stored.dtype, stored.global_shape[0]
