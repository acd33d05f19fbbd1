"""How many parameters of a GPT a rank holds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megatron_fdd.experts import expert_layers, expert_tensor_size, expert_width, num_expert_layers


def held_parameters(args: argparse.Namespace, stage: int = 0) -> int:
    """Parameters of the GPT that these arguments describe on a rank of a stage; the first one is the fullest.

    Matrices and embeddings, the head's only where there is one stage; norms are left out. Of its experts a rank holds
    those of its expert-parallel share; mixed layers count as their mean.
    """
    has_head = args.untie_embeddings_and_output_weights and args.pipeline_model_parallel_size == 1
    embeddings = ((stage == 0) + has_head) * args.padded_vocab_size * args.hidden_size
    routers = num_expert_layers(args) * (args.num_experts or 0) * args.hidden_size
    layers = matrix_parameters(args, range(args.num_layers)) + routers
    held = len(stage_layers(args, stage))
    return layers * held // args.num_layers + embeddings // args.tensor_model_parallel_size


def stage_layers(args: argparse.Namespace, stage: int) -> range:
    """The layers of a stage where stages are cut evenly, first ones fuller, as a teacher's are."""
    each, more = divmod(args.num_layers, args.pipeline_model_parallel_size)
    first = stage * each + min(stage, more)
    return range(first, first + each + (stage < more))


def matrix_parameters(args: argparse.Namespace, layers: Sequence[int]) -> int:
    """Parameters of the matrices of these layers on a rank; routers are left out."""
    heads = args.num_attention_heads
    head_width = args.kv_channels or args.hidden_size // heads
    groups = args.num_query_groups if args.group_query_attention else heads
    attention = args.hidden_size * head_width * (2 * heads + 2 * groups)
    per_width = args.hidden_size * (3 if args.swiglu else 2)
    with_experts = len(set(expert_layers(args)).intersection(layers))
    dense_widths = (len(layers) - with_experts) * args.ffn_hidden_size
    dense_widths += with_experts * (args.moe_shared_expert_intermediate_size or 0)
    cut = len(layers) * attention + dense_widths * per_width
    experts = with_experts * (args.num_experts or 0) * expert_width(args) * per_width
    expert_ranks = expert_tensor_size(args) * args.expert_model_parallel_size
    return cut // args.tensor_model_parallel_size + experts // expert_ranks
