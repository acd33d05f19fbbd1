"""Sliding windows under context parallelism: TransformerEngine has them for some ways to communicate only."""

from __future__ import annotations

from argparse import Namespace

import pytest

from megatron_fdd.host.role import Role
from megatron_fdd.plan.context import Model
from megatron_fdd.plan.modules import check_windows


def model(role: Role = Role.STUDENT, **changes: object) -> Model:
    values = {
        "context_parallel_size": 2,
        "transformer_impl": "transformer_engine",
        "window_size": (6, 0),
        "window_attn_skip_freq": None,
        "num_layers": 3,
        "cp_comm_type": ["p2p"],
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
