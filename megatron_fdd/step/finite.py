"""Numbers that are not finite: they stop a run on every rank, before an update or before a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from megatron.training import get_args
from torch import Tensor
from torch.nn.utils import get_total_norm

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


def check_weights_finite(chunks: Sequence[torch.nn.Module], iteration: int) -> None:
    """Refuse to save weights that are not finite. The last update before a save is in no loss yet.

    It reads the weights once and synchronises with the host once, which is little beside the save.

    Args:
        chunks: this rank's part of the student.

    Collectives: one all-reduce of a number over all ranks.

    Raises:
        FloatingPointError: some rank has such weights; raised on every rank.
    """
    weights = [weight.detach() for chunk in chunks for weight in chunk.parameters() if weight.numel()]
    # The largest absolute value; NaN if there is one.
    largest = get_total_norm(weights, norm_type=math.inf) if weights else torch.zeros(())
    bad = (~torch.isfinite(largest)).float().to(torch.cuda.current_device())
    torch.distributed.all_reduce(bad)
    if bad.item() > 0:
        raise FloatingPointError(
            f"iteration {iteration}: the updated weights are not finite on {bad.item():.0f} rank(s), so they were not "
            f"saved. {_way_on()}"
        )


def _way_on() -> str:
    """Return how to go on. The last checkpoint may hold huge weights: they are finite before they become infinite."""
    last = saved_iteration(get_args().save)
    if last is None:
        return "Start again with a lower --lr or more --lr-warmup-iters, and look at the data of this step"
    return (
        "Look at the data of this step, or lower --lr, with --override-opt_param-scheduler, and go on from the last "
        f"checkpoint (of iteration {last}), or one before it, if that stops too (--ckpt-step N)"
    )
