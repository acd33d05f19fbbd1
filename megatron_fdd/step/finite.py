"""Numbers that are not finite: they stop a run on every rank, before an update or before a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.training import get_args
from torch import Tensor
from torch.nn.utils import get_total_norm

from megatron_fdd.host.checkpoint import iteration_folder
from megatron_fdd.host.saving import saved_iteration


def check_means_finite(means: Mapping[str, Tensor]) -> None:
    """Refuse to update with a loss that is not finite. One host synchronisation.

    Raises:
        FloatingPointError: names the means of the step (0-dim tensors, the same on every rank) that are not finite.
    """
    values = torch.stack(list(means.values())).tolist()
    bad = [name for name, value in zip(means, values, strict=True) if not math.isfinite(value)]
    if bad:
        raise FloatingPointError(
            f"iteration {get_args().curr_iteration + 1}: {', '.join(bad)} not finite. "
            f"Nothing was updated or saved in this step. {_way_on()}"
        )


def check_gradient_finite(norm: float | None, iteration: int) -> None:
    """Refuse to continue when the gradient's norm is not finite. `norm`: None if Megatron itself skipped the step.

    Raises:
        FloatingPointError: the norm is not finite; it is the same on every rank.
    """
    if norm is not None and not math.isfinite(norm):
        raise FloatingPointError(f"iteration {iteration}: the norm of the gradient is {norm}. {_way_on()}")


def check_weights_finite(chunks: Sequence[torch.nn.Module], optimizer: Any, iteration: int) -> None:
    """Refuse to save weights, or a state of the optimizer, that are not finite.

    The last update before a save is in no loss yet, and a weight whose second moment is infinite only stands still. It
    reads both once and synchronises with the host three times, which is little beside the save.

    Args:
        chunks: this rank's part of the student.
        optimizer: Megatron's; None without one.

    Collectives: one all-reduce of two numbers over all ranks.

    Raises:
        FloatingPointError: some rank has such numbers; raised on every rank.
    """
    weights = [weight.detach() for chunk in chunks for weight in chunk.parameters()]
    bad = torch.tensor([_has_other(weights), _has_other(_states(optimizer))], dtype=torch.float32)
    bad = bad.to(torch.cuda.current_device())
    torch.distributed.all_reduce(bad)
    weights_on, moments_on = bad.tolist()
    if weights_on > 0:
        raise FloatingPointError(
            f"iteration {iteration}: the updated weights are not finite on {weights_on:.0f} rank(s), so they were not "
            f"saved. {_way_on()}"
        )
    if moments_on > 0:
        raise FloatingPointError(
            f"iteration {iteration}: the optimizer's moments are not finite on {moments_on:.0f} rank(s), so nothing "
            f"was saved. {_way_on()}"
        )


def _states(optimizer: Any) -> list[Tensor]:
    """Return the tensors that an optimizer of Megatron's keeps for its weights, where they are not rounded to bytes."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    inner = [each.optimizer for each in chained if getattr(each, "optimizer", None) is not None]
    values = [value for each in inner for state in each.state.values() for value in state.values()]
    return [value for value in values if isinstance(value, Tensor) and value.itemsize > 1]


def _has_other(tensors: Sequence[Tensor]) -> bool:
    """Whether some number is not finite. Host synchronisation: one."""
    floats = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    # The largest absolute value; NaN if there is one.
    return bool(floats) and not bool(get_total_norm(floats, norm_type=math.inf).isfinite())


def _way_on() -> str:
    """Return how to go on. The last checkpoint may hold huge weights: they are finite before they become infinite."""
    folder = get_args().save
    last = saved_iteration(folder)
    if last is None:
        return "Start again with a lower --lr or more --lr-warmup-iters, and look at the data of this step"
    earlier = any(path != iteration_folder(folder, last) for path in Path(folder).glob("iter_*"))
    return (
        "Look at the data of this step, or lower --lr, with --override-opt_param-scheduler, and go on from the last "
        f"checkpoint (of iteration {last})"
    ) + (", or one before it, if that stops too (--ckpt-step N)" if earlier else "")
