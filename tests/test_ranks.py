"""The live ranks themselves: causes come first, a broken pool is replaced, results come back."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.rerun_state_machine import initialize_rerun_state_machine

from tests.harness.ranks import Layout, distributed, run_on_ranks

pytestmark = pytest.mark.tier("default")

PAIR = Layout(ranks=2)
Failed = pytest.fail.Exception


def _rank_doubled(offset: int) -> int:
    return 2 * dist.get_rank() + offset


def _rank_one_fails() -> None:
    value = 41 + dist.get_rank()
    if dist.get_rank() == 1:
        assert value == 43, "the cause"
    dist.barrier()


def _rank_one_dies() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    dist.all_reduce(torch.ones(1))


def _rank_zero_sleeps() -> None:
    if dist.get_rank() == 0:
        time.sleep(60)


def _skips() -> None:
    pytest.skip("not here")


def _leave_state_behind() -> tuple[bool, int, str | None, float]:
    """What this body found, before it leaves Megatron's state, groups, environment and seed changed."""
    found = (
        parallel_state.model_parallel_is_initialized(),
        len(dist.distributed_c10d._world.pg_map),
        os.environ.get("NVTE_FLASH_ATTN"),
        torch.rand(1).item(),
    )
    parallel_state.initialize_model_parallel(2)
    initialize_rerun_state_machine()
    os.environ["NVTE_FLASH_ATTN"] = "0"
    torch.manual_seed(7)
    return found


def _sum_over_tensor_ranks() -> int:
    one = torch.ones(1)
    dist.all_reduce(one, group=parallel_state.get_tensor_model_parallel_group())
    return int(one)


def test_results_come_in_the_order_of_ranks() -> None:
    assert run_on_ranks(_rank_doubled, PAIR, {"offset": 5}) == [5, 7]


@pytest.mark.parametrize(
    ("body", "timeout_s", "first", "others"),
    [
        (
            _rank_one_fails,
            60,
            r"rank 1 failed first: AssertionError: the cause\nassert 42 == 43",
            r"[\s\S]*rank 0 hung",
        ),
        (_rank_one_dies, 60, r"rank 1 died first: exit code 7", r"rank 0 (failed|hung)"),
        (_rank_zero_sleeps, 1, r"rank 0 hung first: no answer after 1 s", r"_rank_zero_sleeps[\s\S]*rank 1"),
    ],
)
def test_the_cause_is_reported_first_and_the_pool_recovers(
    body: object, timeout_s: float, first: str, others: str
) -> None:
    with pytest.raises(Failed, match=rf"\A{first}[\s\S]*{others}"):
        run_on_ranks(body, PAIR, timeout_s=timeout_s)
    assert run_on_ranks(_rank_doubled, PAIR, {"offset": 0}) == [0, 2]


def test_a_skip_on_the_ranks_skips_the_test() -> None:
    with pytest.raises(pytest.skip.Exception, match="not here"):
        run_on_ranks(_skips, PAIR)


@pytest.mark.parametrize("scale", [1, 3])
@distributed(tp=2)
def test_a_body_runs_on_every_rank_with_fixtures_and_parameters(scale: int, tmp_path: Path) -> None:
    assert parallel_state.get_tensor_model_parallel_world_size() == 2
    (tmp_path / f"{dist.get_rank()}").touch()
    total = torch.full((1,), scale * (dist.get_rank() + 1.0), device="cuda")
    dist.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
    assert total.item() == 3 * scale
    assert len(list(tmp_path.iterdir())) == 2


def test_sizes_and_a_bare_world_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="not both"):
        Layout(ranks=4, tp=2)


def test_a_layout_is_entered_again_with_its_own_groups() -> None:
    for tp in (1, 2, 1):
        assert run_on_ranks(_sum_over_tensor_ranks, Layout(tp=tp, dp=2 // tp)) == [tp, tp]


def test_a_body_leaves_nothing_to_the_next_one() -> None:
    first, second = (run_on_ranks(_leave_state_behind, PAIR) for _ in range(2))
    assert first == second
