"""The shape of a model, compared with a calculation by hand: widths, parameters, and a rank's part of them."""

from __future__ import annotations

from argparse import Namespace

import pytest

from megatron_fdd.plan.flops import layer_flops
from megatron_fdd.plan.model_shape import ExpertShape, ModelShape, ParallelSizes

ARGS = Namespace(
    num_layers=4, hidden_size=24, num_attention_heads=6, kv_channels=None, group_query_attention=True,
    num_query_groups=2, attention_output_gate=True, ffn_hidden_size=40, swiglu=True, seq_length=16, num_experts=8,
    moe_layer_freq=2, moe_ffn_hidden_size=None, moe_router_topk=3, moe_shared_expert_intermediate_size=10,
    tensor_model_parallel_size=2, pipeline_model_parallel_size=1, expert_model_parallel_size=4,
    expert_tensor_parallel_size=None,
)  # fmt: skip


def test_a_model_with_experts_by_hand() -> None:
    shape, sizes = ModelShape.of_args(ARGS), ParallelSizes.of_args(ARGS)
    assert shape.experts == ExpertShape(count=8, width=40, top_k=3, shared_width=10, layers=(0, 2))
    assert (shape.head_width, shape.attention_width, shape.qkv_width) == (4, 24, 4 * (6 + 6 + 2 + 2))
    assert shape.active_ffn == (2 * (3 * 40 + 10) + 2 * 40) // 4
    assert shape.router_parameters == 2 * 8 * 24
    attention, per_width = 24 * (64 + 24), 3 * 24
    # One of the layers 1, 2 and 3 has experts: shared ones, and 8 experts over 4 ranks, each cut in 2.
    held = (3 * attention + (2 * 40 + 10) * per_width) // 2 + 8 * 40 * per_width // (4 * 2)
    assert shape.matrix_parameters([1, 2, 3], sizes) == held


@pytest.mark.parametrize("pattern", [1, 2, 3, 4, 5])
def test_a_frequency_is_a_pattern(pattern: int) -> None:
    spelled = [1 if layer % pattern == 0 else 0 for layer in range(ARGS.num_layers)]
    shapes = [
        ModelShape.of_args(Namespace(**vars(ARGS) | {"moe_layer_freq": freq})) for freq in (pattern, spelled)
    ]
    assert shapes[0] == shapes[1]


LATENT = {
    "multi_latent_attention": True,
    "num_experts": None,
    "attention_output_gate": False,
    "q_lora_rank": 20,
}
LATENT |= {"kv_lora_rank": 12, "qk_head_dim": 5, "qk_pos_emb_head_dim": 2, "v_head_dim": 3}


@pytest.mark.parametrize(
    ("latent", "before", "queries"), [(20, 24 * (20 + 12 + 2), 20), (None, 24 * (12 + 2), 24)]
)
def test_multi_latent_attention_by_hand(latent: int | None, before: int, queries: int) -> None:
    """TransformerEngine does not cut the matrices before latents."""
    args = Namespace(**vars(ARGS) | LATENT | {"q_lora_rank": latent})
    shape, sizes = ModelShape.of_args(args), ParallelSizes.of_args(args)
    assert (shape.query_width, shape.attention_width) == (6 * 7, 6 * 3)
    others = queries * 6 * 7 + 12 * 6 * (5 + 3) + 6 * 3 * 24
    assert shape.attention_parameters == before + others
    assert shape.matrix_parameters([0], sizes) == before + (others + 40 * 3 * 24) // 2
    scores_and_values = 16 * (6 * 7 + 6 * 3) / 2
    assert layer_flops(shape) == 2 * (before + others + 40 * 3 * 24 + scores_and_values)


def test_a_width_that_megatron_fills_in_later_is_0() -> None:
    unfilled = Namespace(**vars(ARGS) | {"ffn_hidden_size": None, "num_experts": None})
    assert (ModelShape.of_args(unfilled).ffn, ModelShape.of_args(unfilled).active_ffn) == (0, 0)
