"""The reason why grouped experts with delayed scaling need the expert-parallel size of their training.

Megatron cuts a module's scales into states of its experts as if they were ordered by kind; TransformerEngine orders
them by expert.
"""

from __future__ import annotations

import os
from typing import Any
from unittest.mock import patch

import torch

from tests.harness.ranks import Layout, run_on_ranks
from tests.transformer_engine import IMAGE, needs_python

pytestmark = needs_python

KINDS = ("input", "weight")


def grouped(num_experts: int) -> Any:
    from megatron.core.extensions.transformer_engine import TEGroupedLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1, hidden_size=16, num_attention_heads=2, num_moe_experts=num_experts, moe_ffn_hidden_size=16,
        use_cpu_initialization=True, perform_initialization=False, params_dtype=torch.float32,
    )  # fmt: skip
    return TEGroupedLinear(
        num_experts, 16, 16, parallel_mode=None, config=config, init_method=torch.nn.init.zeros_, bias=False,
        skip_bias_add=False, is_expert=True,
    )  # fmt: skip


def places(module: Any) -> list[tuple[int, ...]]:
    """Return the places of each expert's scales among the scales of a module."""
    step = module._num_fp8_tensors_per_gemm["fwd"]
    return [
        tuple(module._offsets[kind] + expert * step for kind in KINDS) for expert in range(module.num_gemms)
    ]


def stored_and_loaded(saved: int, loaded: int) -> list[list[float]]:
    """Save, on one rank, scales (10 e + 1, 10 e + 2) of `saved` experts; return what the first `loaded` experts get."""
    from transformer_engine.common.recipe import DelayedScaling

    with patch.dict(os.environ, {"NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE": "1"}):
        source, target = grouped(saved), grouped(loaded)
        source.fp8_meta |= {"num_gemms": saved, "recipe": DelayedScaling(amax_history_len=2)}
        source.init_fp8_meta_tensors(source.fp8_meta["recipe"])
        source.fp8 = True
        for expert, (first, second) in enumerate(places(source)):
            source.fp8_meta["scaling_fwd"].scale[first] = 10 * expert + 1
            source.fp8_meta["scaling_fwd"].scale[second] = 10 * expert + 2
        states = source._split_extra_state(source.get_extra_state())
        names = ["_extra_state", *(f"_extra_state{expert}" for expert in range(1, loaded))]
        target.load_state_dict(dict(zip(names, states, strict=False)), strict=False)
        scale = target.fp8_meta["scaling_fwd"].scale
        return [[scale[place].item() for place in each] for each in places(target)]


def test_as_many_experts_get_their_own_and_fewer_do_not() -> None:
    wanted = [[10 * expert + kind for kind in (1, 2)] for expert in range(4)]
    for loaded in (4, 2):
        arguments = {"saved": 4, "loaded": loaded}
        [found] = run_on_ranks(stored_and_loaded, Layout(), arguments, image=IMAGE)
        assert (found == wanted[:loaded]) == (loaded == 4)
