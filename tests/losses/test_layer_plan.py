"""The choice and pairing of layers: integers, compared with the published examples."""

from __future__ import annotations

import pytest

from megatron_fdd.config import FddConfig
from megatron_fdd.config.values import parse_layer_pairs
from megatron_fdd.losses.layer_plan import Plan
from megatron_fdd.losses.pairs import (
    LayerPair,
    plan_pairs,
    sample_blocks,
)

TEACHER = {"teacher_load": "somewhere"}


@pytest.mark.parametrize(
    ("layers", "blocks"),
    [(12, [2, 4, 6, 8]), (48, [9, 18, 27, 36]), (32, [6, 12, 18, 24]), (40, [8, 16, 24, 32])],
)
def test_the_papers_rule_gives_the_papers_layers(layers: int, blocks: list[int]) -> None:
    assert sample_blocks("paper", 4, layers, "student") == blocks


def test_linspace_spreads_over_the_whole_depth() -> None:
    assert sample_blocks("linspace", 4, 12, "student") == [2, 4, 7, 9]


@pytest.mark.parametrize("rule", ["paper", "linspace"])
@pytest.mark.parametrize("layers", range(3, 20))
def test_every_rule_gives_distinct_blocks_inside_the_model(rule: str, layers: int) -> None:
    for count in range(1, layers):
        blocks = sample_blocks(rule, count, layers, "student")
        assert len(blocks) == count
        assert blocks == sorted(set(blocks))
        assert blocks[0] >= 1
        assert blocks[-1] <= layers


def test_pairs_join_both_models_in_depth_order() -> None:
    pairs = plan_pairs(FddConfig(layers=3, **TEACHER), student_layers=8, teacher_layers=32)
    assert [pair.name for pair in pairs] == ["s2:t8", "s4:t16", "s6:t24"]
    assert (pairs[0].student_layer, pairs[0].teacher_layer) == (1, 7)


def test_too_many_layers_is_refused_with_the_bound() -> None:
    with pytest.raises(
        ValueError, match=r"student of at least 7 layers, it has 6: lower --fdd-layers to at most 5"
    ):
        plan_pairs(FddConfig(layers=6, **TEACHER), 6, 20)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (((0, 1), (2, 3)), "student block 0 is not in 1..6"),
        (((1, 1), (7, 9)), "student block 7 is not in 1..6"),
        (((1, 1), (2, 13)), "teacher block 13 is not in 1..12"),
        (((2, 3), (2, 5)), r"student blocks \[2, 2\] must increase"),
        (((2, 5), (3, 4)), r"teacher blocks \[5, 4\] must increase"),
    ],
)
def test_wrong_pairs_are_refused(pairs: tuple[tuple[int, int], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_pairs(FddConfig(layer_pairs=pairs, **TEACHER), student_layers=6, teacher_layers=12)


def test_given_pairs_may_hold_the_first_and_the_last_block() -> None:
    pairs = plan_pairs(FddConfig(layer_pairs=((1, 1), (6, 12)), **TEACHER), 6, 12)
    assert pairs == (LayerPair(1, 1), LayerPair(6, 12))


@pytest.mark.parametrize("text", ["1", "1:2,", "1:2;3:4", "a:b", "1:-2", "1:2:3", "²:3", "1:③", ""])
def test_unreadable_pairs_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="STUDENT:TEACHER"):
        parse_layer_pairs(text)


def test_pairs_are_read() -> None:
    assert parse_layer_pairs("2:4, 4:9") == ((2, 4), (4, 9))
    assert parse_layer_pairs(None) is None


def plan(
    pairs: list[tuple[int, int]],
    student: list[int],
    teacher: list[int],
    beta: float = 1.0,
    num_stages: int = 0,
) -> Plan:
    config = FddConfig(layer_pairs=tuple(pairs), beta=beta, **TEACHER)
    found = plan_pairs(config, sum(student), sum(teacher))
    return Plan(config, found, num_stages or len(student), tuple(student), tuple(teacher), 100, 128)


def test_each_stage_knows_its_taps_and_carries() -> None:
    chunks = plan([(2, 3), (3, 6), (7, 9)], student=[2, 2, 2, 2], teacher=[5, 5]).chunks
    assert [chunk.pairs for chunk in chunks] == [(0,), (1,), (), (2,)]
    assert [chunk.carry_in for chunk in chunks] == [None, 0, 1, 1]
    assert [chunk.carry_out for chunk in chunks] == [0, 1, 1, None]
    # A stage that only passes a carry on needs nothing from the teacher.
    assert [chunk.teacher_pairs for chunk in chunks] == [(0,), (0, 1), (), (1, 2)]
    assert [chunk.is_last for chunk in chunks] == [False, False, False, True]


def test_without_the_delta_nothing_is_carried() -> None:
    chunks = plan([(2, 3), (7, 9)], student=[4, 4], teacher=[10], beta=0.0).chunks
    assert {chunk.carry_in for chunk in chunks} | {chunk.carry_out for chunk in chunks} == {None}


def test_virtual_stages_go_round_the_stages() -> None:
    virtual = plan([(1, 1), (4, 5), (7, 9)], student=[2, 2, 2, 2], teacher=[5, 5], num_stages=2)
    assert [chunk.pairs for chunk in virtual.chunks_on(0)] == [(0,), ()]
    assert [chunk.pairs for chunk in virtual.chunks_on(1)] == [(1,), (2,)]
    assert virtual.tapping_stages == (0, 1)
    assert virtual.teacher_pairs(0) == {0}
    assert virtual.teacher_pairs(1) == {0, 1, 2}
    assert virtual.has_one_width
    assert not plan([(1, 1), (7, 9)], [2, 2, 2, 2], [5, 5], beta=0.0, num_stages=2).has_one_width
    assert not plan([(1, 1), (7, 9)], [4, 4], [5, 5]).has_one_width


def test_every_rank_of_a_large_virtual_layout() -> None:
    """80 teacher and 32 student layers on 8 stages with 4 virtual stages: one student layer for each chunk."""
    pairs = [(6, 16), (12, 32), (18, 48), (24, 64)]
    large = plan(pairs, student=[1] * 32, teacher=[10] * 8, num_stages=8)
    owners = [
        (stage, index) for stage in range(8) for chunk in large.chunks_on(stage) for index in chunk.pairs
    ]
    assert owners == [(1, 2), (3, 1), (5, 0), (7, 3)]
    for before, after in zip(large.chunks, large.chunks[1:], strict=False):
        assert before.carry_out == after.carry_in
    for stage in range(8):
        for chunk in large.chunks_on(stage):
            assert set(chunk.teacher_pairs) <= large.teacher_pairs(stage)
    carried = [chunk.carry_out for chunk in large.chunks]
    assert carried == [None] * 5 + [0] * 6 + [1] * 6 + [2] * 6 + [None] * 9


def test_a_large_layout_is_consistent() -> None:
    large = plan([(6, 16), (12, 32), (18, 48), (24, 64)], student=[4] * 8, teacher=[10] * 8)
    assert large.teacher_stages == (1, 3, 4, 6)
    assert sorted(index for chunk in large.chunks for index in chunk.pairs) == [0, 1, 2, 3]
    for before, after in zip(large.chunks, large.chunks[1:], strict=False):
        assert before.carry_out == after.carry_in
    first, last = large.chunks[0], large.chunks[-1]
    assert first.carry_in is None
    assert last.carry_out is None
    assert [chunk.carry_out for chunk in large.chunks] == [None, 0, 1, 1, 2, None, None, None]
