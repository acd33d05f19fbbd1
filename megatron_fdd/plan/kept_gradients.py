"""The bytes of inner layers' gradients that the forward pass keeps for the backward pass, on a GPU."""

from __future__ import annotations

import argparse

from megatron_fdd.losses.inner_pass import knows_all_gradients
from megatron_fdd.losses.layer_plan import ChunkPlan, Plan
from megatron_fdd.losses.terms import needs_of, tap_terms
from megatron_fdd.ops.divergence import DIVERGENCES


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

    def of_chunk(chunk: ChunkPlan) -> int:
        count = min(len(chunk.pairs), most)
        num_sums = int(chunk.carry_out in chunk.pairs) if _are_known(plan) else count
        return (count - num_sums) * at_once + num_sums * sums

    return max(
        sum(map(of_chunk, plan.chunks_on(stage))) * _in_flight(plan, stage, micro_batches)
        for stage in range(plan.num_stages)
    )


def _are_known(plan: Plan) -> bool:
    """Whether taps have their gradient from the forward pass, unless they go on to another stage (`inner_pass`)."""
    config = plan.config
    has_triton = DIVERGENCES[config.trajectory_divergence].triton is not None
    return (
        knows_all_gradients(tap_terms(config), config)
        and config.lens_head == "detached"
        and not (plan.is_teacher_capped or plan.is_student_capped)
        and (config.kernels == "triton" or (config.kernels == "auto" and has_triton))
    )


def _in_flight(plan: Plan, stage: int, micro_batches: int) -> int:
    """Count the micro-batches of a chunk before their backward pass."""
    stages = plan.num_stages
    if len(plan.student_layers) > stages:
        return min(micro_batches, 2 * stages)  # the most that a chunk of an interleaved schedule can have
    return min(micro_batches, stages - stage)
