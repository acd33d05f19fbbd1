"""The bytes of inner layers' gradients that the forward pass keeps for the backward pass, on a GPU."""

from __future__ import annotations

import argparse

from megatron_fdd.losses.layer_plan import ChunkPlan, Plan
from megatron_fdd.losses.terms import needs_of
from megatron_fdd.plan.flops import is_computed_at_once


def kept_gradient_bytes(
    plan: Plan, args: argparse.Namespace, rows: tuple[int, int], micro_batches: int
) -> int:
    """Count the bytes on the stage that keeps most: for each tap either one gradient in the student's dtype, or sums.

    Args:
        rows: tokens of a micro-batch that are looked at: of this rank, and of all that share the vocabulary.
    """
    own_rows, all_rows = rows
    at_once = own_rows * args.hidden_size * args.params_dtype.itemsize
    sums = (2 if needs_of(plan.config).lse else 1) * all_rows * args.hidden_size * 4
    most = 2 if plan.config.sample_one_tap else len(plan.pairs)
    is_capped = plan.is_teacher_capped or plan.is_student_capped
    are_at_once = is_computed_at_once(plan.config, is_capped=is_capped)

    def of_chunk(chunk: ChunkPlan) -> int:
        count = min(len(chunk.pairs), most)
        num_sums = int(chunk.carry_out in chunk.pairs) if are_at_once else count
        return (count - num_sums) * at_once + num_sums * sums

    return max(
        sum(map(of_chunk, plan.chunks_on(stage))) * _in_flight(plan, stage, micro_batches)
        for stage in range(plan.num_stages)
    )


def _in_flight(plan: Plan, stage: int, micro_batches: int) -> int:
    """Count the micro-batches of a chunk before their backward pass."""
    stages = plan.num_stages
    if len(plan.student_layers) > stages:
        return min(micro_batches, 2 * stages)  # the most that a chunk of an interleaved schedule can have
    return min(micro_batches, stages - stage)
