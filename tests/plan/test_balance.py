"""The load of each pipeline chunk, the bubble, and the layout that evens it out, compared with closed forms, brute
force, and Megatron's own schedule and layout parser."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from megatron_fdd.config import FddConfig
from megatron_fdd.plan.balance import (
    balanced_split,
    bubble_fraction,
    chunk_loads,
    describe_balance,
    layout_string,
    stage_tasks,
)
from megatron_fdd.plan.flops import TokenFlops, token_flops
from megatron_fdd.plan.model_shape import ModelShape
from tests.oracle.model_shapes import GPT2, GPT2_XL, LLAMA3_8B, LLAMA3_70B, QWEN3_2B, QWEN3_32B

FDD = FddConfig(teacher_load="somewhere")
# (student, teacher, layers of the student, stages, virtual stages)
SIZES = [
    (LLAMA3_8B, LLAMA3_70B, 32, 2, 1),
    (LLAMA3_8B, LLAMA3_70B, 32, 4, 1),
    (LLAMA3_8B, LLAMA3_70B, 32, 4, 2),
    (LLAMA3_8B, LLAMA3_70B, 32, 8, 4),
    (LLAMA3_70B, LLAMA3_70B, 80, 8, 1),
    (LLAMA3_70B, LLAMA3_70B, 80, 4, 2),
    (QWEN3_2B, QWEN3_32B, 28, 4, 1),
    (GPT2, GPT2_XL, 12, 4, 1),
]


def even_split(num_layers: int, num_stages: int, virtual: int) -> list[list[int]]:
    """Return the same number of layers for each chunk, Megatron's default; a remainder goes to the first chunks."""
    size, rest = divmod(num_layers, num_stages * virtual)
    sizes = [size + (chunk < rest) for chunk in range(num_stages * virtual)]
    return [sizes[stage::num_stages] for stage in range(num_stages)]


def sampled(num_layers: int) -> list[int]:
    return [step * (num_layers // 5) - 1 for step in range(1, 5)]


def test_chunks_run_through_all_stages_of_a_virtual_stage_first() -> None:
    loads = chunk_loads(TokenFlops(layer=10, tap=3, head=7), [[1, 2], [3, 1]], tapped_layers=[0, 4, 5, 6])
    assert [(load.stage, load.virtual, load.layers, load.taps) for load in loads] == [
        (0, 0, 1, 1), (1, 0, 3, 0), (0, 1, 2, 2), (1, 1, 1, 1),
    ]  # fmt: skip
    assert [load.flops for load in loads] == [13, 30, 26, 20]
    assert [load.head_flops for load in loads] == [0, 0, 0, 7]


def test_a_tap_that_goes_on_to_a_later_chunk_costs_more() -> None:
    flops = TokenFlops(layer=10, tap=3, head=7, sent_tap=2)
    loads = chunk_loads(flops, [[1, 2], [3, 1]], tapped_layers=[0, 4, 5, 6])
    assert [load.tap_flops for load in loads] == [3 + 2, 0, 2 * 3 + 2, 3]


@pytest.mark.parametrize(("num_stages", "virtual", "microbatches"), [(4, 1, 6), (4, 2, 8), (3, 2, 11)])
def test_a_stage_runs_megatrons_order(num_stages: int, virtual: int, microbatches: int) -> None:
    num_chunks = num_stages * virtual
    table = get_schedule_table(microbatches, virtual, num_stages)
    if virtual == 1:
        assert table == [(microbatch, 0) for microbatch in range(microbatches)]
    for stage in range(num_stages):
        group = SimpleNamespace(size=lambda: num_stages, rank=lambda stage=stage: stage)
        communicator = SimpleNamespace(
            pp_group=group, virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None
        )
        _, _, num_ahead, _ = get_pp_rank_microbatches(
            microbatches, virtual, num_stages, p2p_communicator=communicator
        )
        tasks = stage_tasks(stage, num_stages, num_chunks, microbatches)
        forward = [(step, microbatch) for step, microbatch in tasks if step < num_chunks]
        backward = [(step, microbatch) for step, microbatch in tasks if step >= num_chunks]
        assert forward == [(chunk * num_stages + stage, microbatch) for microbatch, chunk in table]
        assert backward == [
            (2 * num_chunks - 1 - ((virtual - 1 - chunk) * num_stages + stage), microbatch)
            for microbatch, chunk in table
        ]
        # After the warm-up, forward and backward take turns until no forward is left.
        kinds = "".join("f" if step < num_chunks else "b" for step, _ in tasks)
        assert re.fullmatch(f"f{{{num_ahead}}}(fb)*b{{{num_ahead}}}", kinds)


@pytest.mark.parametrize(
    ("num_stages", "virtual", "microbatches"), [(1, 1, 3), (2, 1, 2), (4, 1, 9), (2, 2, 8), (4, 3, 12)]
)
def test_equal_chunks_wait_only_to_fill_and_drain(num_stages: int, virtual: int, microbatches: int) -> None:
    loads = chunk_loads(TokenFlops(6, 0, 0), even_split(num_stages * virtual * 2, num_stages, virtual), ())
    waiting_per_busy = (num_stages - 1) / (microbatches * virtual)
    assert bubble_fraction(loads, microbatches) == pytest.approx(waiting_per_busy / (1 + waiting_per_busy))


def test_the_heaviest_stage_sets_the_pace_of_1f1b() -> None:
    loads = chunk_loads(TokenFlops(6, 12, 18), [[2], [2], [2], [2]], tapped_layers=[0])
    assert [load.flops for load in loads] == [24, 12, 12, 30]
    step = 200 * 30 + 24 + 12 + 12
    assert bubble_fraction(loads, 200) == pytest.approx(1 - 200 * 78 / 4 / step, abs=1e-3)


def test_equal_stages_of_unequal_chunks_wait() -> None:
    """Both splits give each stage 12 layers; this shows why the heaviest chunk counts."""
    flops = TokenFlops(6, 0, 0)
    even = bubble_fraction(chunk_loads(flops, [[6, 6], [6, 6]], ()), 8)
    assert bubble_fraction(chunk_loads(flops, [[1, 11], [1, 11]], ()), 8) > 3 * even


def test_nothing_to_do_is_no_bubble() -> None:
    assert bubble_fraction(chunk_loads(TokenFlops(0, 0, 0), [[1], [1]], ()), 4) == 0


@pytest.mark.parametrize(("student", "teacher", "num_layers", "num_stages", "virtual"), SIZES)
def test_megatron_reads_the_layout(
    student: ModelShape, teacher: ModelShape, num_layers: int, num_stages: int, virtual: int
) -> None:
    flops, taps = token_flops(student, teacher, FDD), sampled(num_layers)
    split = balanced_split(flops, num_layers, num_stages, virtual, taps)
    layout = PipelineParallelLayerLayout.from_str(layout_string(split), num_stages)
    layout.validate_layer_layout(num_layers, None)
    assert layout.virtual_pipeline_model_parallel_size == virtual
    decoders = [[chunk.count(LayerType.decoder) for chunk in stage] for stage in layout.layout]
    assert decoders == split
    assert min(itertools.chain(*split)) >= 1
    # Megatron's order of layers decides where the taps are.
    order = [(stage, chunk) for chunk in range(virtual) for stage in range(num_stages)]
    owners = [owner for owner in order for _ in range(decoders[owner[0]][owner[1]])]
    for load in chunk_loads(flops, split, taps):
        assert load.taps == [owners[tap] for tap in taps].count((load.stage, load.virtual))


@pytest.mark.parametrize(("student", "teacher", "num_layers", "num_stages", "virtual"), SIZES)
def test_the_heaviest_chunk_is_never_heavier_than_the_even_splits(
    student: ModelShape, teacher: ModelShape, num_layers: int, num_stages: int, virtual: int
) -> None:
    flops, taps = token_flops(student, teacher, FDD), sampled(num_layers)
    heaviest = [
        max(load.flops for load in chunk_loads(flops, split, taps))
        for split in (
            balanced_split(flops, num_layers, num_stages, virtual, taps),
            even_split(num_layers, num_stages, virtual),
        )
    ]
    assert heaviest[0] <= heaviest[1]


def all_splits(num_layers: int, num_stages: int, virtual: int) -> Iterator[list[list[int]]]:
    for cuts in itertools.combinations(range(1, num_layers), num_stages * virtual - 1):
        ends = (0, *cuts, num_layers)
        sizes = [end - start for start, end in itertools.pairwise(ends)]
        yield [sizes[stage::num_stages] for stage in range(num_stages)]


@pytest.mark.parametrize(("num_stages", "virtual"), [(1, 1), (2, 1), (3, 1), (4, 1), (2, 2), (3, 2)])
def test_no_split_has_a_lighter_heaviest_chunk(num_stages: int, virtual: int) -> None:
    for taps, costs in itertools.product(
        ([], [0], [3], [7], [0, 1], [2, 3], [0, 4, 7]),
        ((0, 0, 0), (35, 0, 0), (15, 25, 5), (7, 55, 0), (7, 9, 30), (120, 160, 40)),
    ):
        flops = TokenFlops(10, *costs)

        def heaviest(split: list[list[int]], flops: TokenFlops = flops, taps: list[int] = taps) -> int:
            return max(load.flops for load in chunk_loads(flops, split, taps))

        found = heaviest(balanced_split(flops, 8, num_stages, virtual, taps))
        lightest = min(heaviest(split) for split in all_splits(8, num_stages, virtual))
        assert found == lightest, (taps, costs)


def test_the_smallest_maximum_wins_over_the_smallest_spread() -> None:
    split = balanced_split(TokenFlops(layer=10, tap=15, head=25), 6, 3, 1, tapped_layers=[0, 1])
    assert [load.flops for load in chunk_loads(TokenFlops(10, 15, 25), split, [0, 1])] == [25, 45, 45]


def test_of_equally_heavy_splits_an_even_one_wins() -> None:
    split = balanced_split(TokenFlops(layer=10, tap=120, head=0), 8, 4, 1, tapped_layers=[0])
    assert sorted(size for (size,) in split) == [1, 2, 2, 3]


def test_fewer_layers_than_chunks_leaves_chunks_empty() -> None:
    split = balanced_split(TokenFlops(10, 0, 15), 3, 2, 2, ())
    assert layout_string(split) == "Et|t|t|L"


def test_the_dry_run_names_loads_bubbles_and_the_flag() -> None:
    flops, split = TokenFlops(layer=10**9, tap=4 * 10**9, head=3 * 10**9), [[2, 2], [2, 2]]
    lines = describe_balance(flops, split, tapped_layers=[0, 5], num_microbatches=8)
    assert "stage 0: 2+2 layer(s), 2 tap(s): 12 with taps, 4 without" in lines[1]
    assert "stage 1: 2+2 layer(s), 0 tap(s): 7 with taps, 7 without" in lines[2]
    bubble, without = (float(share) for share in re.findall(r"([\d.]+)%", lines[3]))
    assert bubble == pytest.approx(100 * bubble_fraction(chunk_loads(flops, split, [0, 5]), 8), abs=0.05)
    assert without == pytest.approx(100 * bubble_fraction(chunk_loads(flops, split, ()), 8), abs=0.05)
    suggestion = re.fullmatch(r" +([\d.]+)% with --pipeline-model-parallel-layout '([EtL|]+)'", lines[4])
    assert suggestion is not None
    layout = PipelineParallelLayerLayout.from_str(suggestion[2], 2).layout
    better = [[chunk.count(LayerType.decoder) for chunk in stage] for stage in layout]
    better_bubble = 100 * bubble_fraction(chunk_loads(flops, better, [0, 5]), 8)
    assert float(suggestion[1]) == pytest.approx(better_bubble, abs=0.05)
    assert better_bubble < bubble


def test_the_dry_run_suggests_nothing_where_nothing_helps() -> None:
    even = describe_balance(TokenFlops(10, 0, 0), [[2], [2]], (), num_microbatches=4)
    assert even[-1].strip() == "no better split into as many chunks was found"
    assert describe_balance(TokenFlops(10, 3, 3), [[4]], [1], num_microbatches=4) == []
