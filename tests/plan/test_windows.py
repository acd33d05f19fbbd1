"""Context parallelism's ways to communicate: which there are, which know sliding windows, which heads they can deal."""

from __future__ import annotations

from argparse import Namespace

import pytest

from megatron_fdd.host.role import Role
from megatron_fdd.plan.context import Model
from megatron_fdd.plan.modules import check_ways, check_windows


def model(role: Role = Role.STUDENT, **changes: object) -> Model:
    values = {
        "context_parallel_size": 2,
        "transformer_impl": "transformer_engine",
        "window_size": (6, 0),
        "window_attn_skip_freq": None,
        "num_layers": 3,
        "cp_comm_type": ["p2p"],
        "num_attention_heads": 12,
        "num_query_groups": 4,
        "group_query_attention": True,
        "tensor_model_parallel_size": 1,
        "hierarchical_context_parallel_sizes": None,
    }
    return Model(role, Namespace(**values | changes), None)


@pytest.mark.parametrize("role", Role)
def test_the_default_is_refused(role: Role) -> None:
    line = rf"the {role.value} has sliding windows \(block 1: \(6, 0\)\), .* none for --cp-comm-type p2p: give a2a or"
    with pytest.raises(ValueError, match=line):
        check_windows(model(role))


@pytest.mark.parametrize(
    ("block", "changes"),
    [
        (1, {"cp_comm_type": "p2p"}),
        (1, {"cp_comm_type": None}),
        (1, {"cp_comm_type": ["a2a+p2p"]}),
        (2, {"cp_comm_type": ["a2a", "p2p", "p2p"]}),
        (2, {"window_attn_skip_freq": [0, 1, 0]}),
        (3, {"window_attn_skip_freq": [0, 0, 1], "cp_comm_type": ["p2p", "p2p", "p2p"]}),
    ],
)
def test_the_first_layer_is_named(block: int, changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=rf"\(block {block}: "):
        check_windows(model(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"cp_comm_type": ["a2a"]},
        {"cp_comm_type": ["all_gather"]},
        {"cp_comm_type": ["p2p", "a2a", "all_gather"], "window_attn_skip_freq": [0, 1, 1]},
        {"context_parallel_size": 1},
        {"transformer_impl": "local"},  # a rehearsal
        {"window_size": None},
        {"window_size": (-1, -1)},
        {"window_size": (-1, 0)},
        {"window_attn_skip_freq": [0, 0, 0]},
    ],
)
def test_what_works_passes(changes: dict[str, object]) -> None:
    check_windows(model(**changes))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"cp_comm_type": ["ring"]}, r"--cp-comm-type ring: must be p2p, all_gather, a2a or a2a\+p2p$"),
        ({"cp_comm_type": "ring", "context_parallel_size": 1}, "--cp-comm-type ring: must be"),
        ({"cp_comm_type": ["a2a"], "context_parallel_size": 3}, "a2a deals heads to 3 .* has 12 in 4 query"),
        ({"cp_comm_type": ["p2p", "a2a", "p2p"], "context_parallel_size": 8}, "a2a deals heads to 8 ranks"),
        ({"cp_comm_type": ["a2a"], "tensor_model_parallel_size": 4}, "to 2 .* has 3 in 1 query groups"),
        ({"cp_comm_type": ["a2a"], "tensor_model_parallel_size": 6}, "to 2 .* has 2 in 1 query groups"),
        (
            {
                "cp_comm_type": ["a2a+p2p"],
                "context_parallel_size": 6,
                "hierarchical_context_parallel_sizes": [3, 2],
            },
            r"a2a\+p2p deals heads to 3 ranks",
        ),
    ],
)
def test_ways_that_cannot_work(changes: dict[str, object], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        check_ways(model(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cp_comm_type": None},
        {"cp_comm_type": ["a2a"]},
        {"cp_comm_type": ["a2a"], "context_parallel_size": 3, "transformer_impl": "local"},
        {"cp_comm_type": ["a2a"], "context_parallel_size": 1},
        {"cp_comm_type": ["a2a"], "context_parallel_size": 3, "group_query_attention": False},
        {
            "cp_comm_type": ["a2a+p2p"],
            "context_parallel_size": 6,
            "hierarchical_context_parallel_sizes": [2, 3],
        },
    ],
)
def test_ways_that_work(changes: dict[str, object]) -> None:
    check_ways(model(**changes))
