"""Ordinary Megatron `torch_dist` checkpoints: writing one of a model alone, reading the model out of any."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

TRACKER_FILE = "latest_checkpointed_iteration.txt"
# Megatron's name for a checkpoint of weights alone: iteration 0, no optimizer and no random state to load.
RELEASE = "release"
_MODEL_KEYS = ("embedding.", "decoder.", "output_layer.")


def save_model(folder: Path, model: torch.nn.Module, args: Namespace, groups: Any) -> None:
    """Write the folder `release` and the tracker file that make `folder` loadable with `--load`.

    Collectives: those of `dist_checkpointing.save` over all ranks.
    """
    from megatron.core import dist_checkpointing

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


def checkpoint_folder(load: Path) -> Path:
    """The folder that a `--load` argument stands for: its latest iteration, or `release`.

    Raises:
        ValueError: no tracker file, an unreadable one, or no distributed checkpoint where it points.
    """
    from megatron.core import dist_checkpointing

    tracker = load / TRACKER_FILE
    if not tracker.is_file():
        raise ValueError(f"{load} is not a Megatron checkpoint: it has no {TRACKER_FILE}")
    latest = tracker.read_text().strip()
    if latest != RELEASE and not latest.isdecimal():
        raise ValueError(f"{tracker} holds {latest!r}, neither an iteration nor {RELEASE!r}")
    folder = load / (RELEASE if latest == RELEASE else f"iter_{int(latest):07d}")
    if not folder.is_dir() or not dist_checkpointing.check_is_distributed_checkpoint(str(folder)):
        raise ValueError(f"{folder}, which {tracker} points at, is not a complete torch_dist checkpoint")
    return folder


def load_args(folder: Path) -> Namespace:
    """The args namespace stored in a checkpoint. ValueError: there is none, or it cannot be read."""
    from megatron.core import dist_checkpointing

    try:
        args = dist_checkpointing.load_common_state_dict(str(folder)).get("args")
    except Exception as error:  # pickle and torch raise whatever the damage leads to
        raise ValueError(f"{folder} cannot be read: {type(error).__name__}: {error}") from error
    if args is None:
        raise ValueError(f"{folder} stores no args; it was not written by Megatron's training loop")
    return args


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


def load_model(folder: Path, model: torch.nn.Module, groups: Any) -> None:
    """Fill the model from a checkpoint saved at any layout; optimizer and random state are not read.

    Collectives: those of `dist_checkpointing.load` over all ranks.

    Raises:
        ValueError: weights missing on either side, damaged files.
    """
    from megatron.core import dist_checkpointing

    metadata = dist_checkpointing.load_content_metadata(str(folder)) or {}
    sharded = model.sharded_state_dict(metadata={**metadata, "dp_cp_group": groups.dp_cp})
    try:
        state, missing, unexpected = dist_checkpointing.load(
            {"model": sharded}, str(folder), strict="return_all"
        )
    except Exception as error:  # whatever the damage leads to
        raise ValueError(f"{folder} cannot be loaded: {type(error).__name__}: {error}") from error
    unused = sorted(key for key in missing if key.startswith(_MODEL_KEYS) and "_extra_state" not in key)
    if unused or unexpected:
        raise ValueError(
            f"{folder} does not hold this model. In the checkpoint only: {', '.join(unused) or 'nothing'}; "
            f"in the model only: {', '.join(sorted(unexpected)) or 'nothing'}"
        )
    model.load_state_dict(state["model"], strict=True)
