"""The width of the teacher's hidden states, for which an int8 record must have room."""

from __future__ import annotations

from argparse import Namespace
from typing import Literal

import pytest
import torch

from megatron_fdd.config import FddConfig
from megatron_fdd.losses.layer_plan import Plan
from megatron_fdd.losses.pairs import LayerPair
from megatron_fdd.plan.checks import OF_BOTH_MODELS, make_checks
from megatron_fdd.plan.context import Context


def check(
    form: Literal["fp8", "int8"], width: int, pairs: tuple[LayerPair, ...] = (LayerPair(1, 2),)
) -> None:
    """Make the checks of both models for a teacher of this width."""
    plan = Plan(FddConfig(teacher_load="given", tap_dtype=form), pairs, 1, (4,), (6,), 100, 100)
    names = ("recompute_granularity", "recompute_method", "recompute_num_layers")
    args = Namespace(params_dtype=torch.bfloat16, rank=1, **dict.fromkeys(names))
    known = Context(plan.config, args, teacher_args=Namespace(hidden_size=width), plan=plan)
    make_checks(OF_BOTH_MODELS, known, to_plan=True)


@pytest.mark.parametrize("width", [7, 65_536])
def test_a_width_without_room_is_refused(width: int) -> None:
    line = f"--fdd-tap-dtype int8: the teacher's hidden states are {width} wide, .* from 8 to 65535; use bf16"
    with pytest.raises(ValueError, match=line):
        check("int8", width)
    check("fp8", width)
    check("int8", width, pairs=())  # no tap


@pytest.mark.parametrize("width", [8, 65_535])
def test_a_width_at_the_bound_is_taken(width: int) -> None:
    check("int8", width)
