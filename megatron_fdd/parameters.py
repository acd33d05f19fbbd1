"""How many parameters of a GPT a rank holds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megatron_fdd.experts import expert_layers, expert_tensor_size, expert_width, num_expert_layers


def held_parameters(args: argparse.Namespace) -> int:
    """Parameters of the GPT that these arguments describe on a rank of its fullest stage, the first one.

    Matrices and embeddings; norms are left out. Of its experts a rank holds those of its expert-parallel share; mixed
    layers count as their mean. Stages are cut evenly, as a teacher's are.
    """
    stages, num_layers = args.pipeline_model_parallel_size, args.num_layers
    held_layers = -(-num_layers // stages)
    embeddings = args.padded_vocab_size * args.hidden_size
    embeddings *= 2 if args.untie_embeddings_and_output_weights and stages == 1 else 1
    routers = num_expert_layers(args) * (args.num_experts or 0) * args.hidden_size
    layers = matrix_parameters(args, range(num_layers)) + routers
    return layers * held_layers // num_layers + embeddings // args.tensor_model_parallel_size


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
