"""A step whose tensor-parallel ranks have GPUs of unlike memory, by a stand-in: all hold as many logits."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch.distributed as dist

from megatron_fdd.ops import implementation
from megatron_fdd.ops.implementation import LARGE_GPU_BYTES, Implementation
from tests.harness.ranks import run_on_ranks
from tests.ops.interpreted import DEVICE, few_columns
from tests.oracle.case import Case, Result, assert_equal, expected, run_step, small

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.tier("all"),
    pytest.mark.skipif(DEVICE != "cpu", reason="ranks are on CPUs, where Triton has its interpreter alone"),
]


def run_on_unlike_gpus(case: Case) -> tuple[Result, list[int]]:
    """Run, on every rank, a step; return for how many tokens its rank held logits, each time that it was asked."""
    own_bytes, held = LARGE_GPU_BYTES // (1 + dist.get_rank()), []

    def held_rows(_self: Implementation, _head_rows: int, gpu_bytes: int) -> int:
        held.append(13 if gpu_bytes >= LARGE_GPU_BYTES else 7)
        return held[-1]

    with (
        few_columns(32),
        patch.object(implementation, "memory_of_gpu", lambda _device: own_bytes),
        patch.object(Implementation, "_held_rows", held_rows),
    ):
        return run_step(case), held


def test_all_ranks_hold_what_the_smallest_holds() -> None:
    """With these kernels inner layers hold logits, too."""
    case = replace(small(Case(tp=2)), kernels="triton")
    wanted = expected(case)
    for result, held in run_on_ranks(run_on_unlike_gpus, case.layout, {"case": case}):
        assert_equal(result, wanted)
        assert set(held) == {7}
