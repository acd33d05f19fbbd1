"""The check that recomputed activations leave every tap: Megatron returns only the last block of a recomputed group."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from megatron_fdd.plan.context import Context


def check_recompute(context: Context) -> None:
    """Refuse recomputation that would drop a tap."""
    args, plan = context.args, context.plan
    assert plan is not None, "the phase is made when it is known"
    check_recompute_keeps_taps(
        [pair.student_layer for pair in plan.pairs],
        plan.student_layers,
        (args.recompute_granularity, args.recompute_method, args.recompute_num_layers),
    )


def check_recompute_keeps_taps(
    layers: Sequence[int], stage_layers: Sequence[int], recompute: tuple[str | None, str | None, int | None]
) -> None:
    """Refuse full/uniform recompute that would drop a tap without a word: Megatron returns group ends only.

    Args:
        layers: tapped layers, 0-based.
        stage_layers: how many layers each pipeline stage holds; groups begin anew on each.
        recompute: Megatron's recompute granularity, method and number of layers.

    Raises:
        ValueError: a tap lies inside a recomputed group.
    """
    granularity, method, group = recompute
    if granularity != "full" or method != "uniform" or not group:
        return
    ends: set[int] = set()
    for last in accumulate(stage_layers):
        first = max(ends, default=0)
        ends |= {*range(first + group, last, group), last}
    hidden = [layer + 1 for layer in layers if layer + 1 not in ends]
    if hidden:
        raise ValueError(
            f"--recompute-method uniform --recompute-num-layers {group} hides the tapped blocks {hidden} "
            "(Megatron returns the last block of each recomputed group only): use --recompute-num-layers 1, "
            "--recompute-method block, or pairs whose student blocks end a group"
        )
