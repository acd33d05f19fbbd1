"""Sends between stages that arrive only when they are waited for, as over NCCL, and without a wait for the device.

Each batch fills what it receives with NaN when it begins. It is sent when it is waited for, after a check that what is
sent has not changed. Over NCCL the host goes on after that wait: nothing else holds the stream back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from tests.harness.late import Late
from tests.harness.ranks import run_on_ranks
from tests.oracle.case import Case, Result, assert_equal, expected, run_step

pytestmark = pytest.mark.tier("default")

CASES = {
    "pp2": Case(pp=2, micro_batches=4),
    "pp2-tp2-sp": Case(pp=2, tp=2, sequence_parallel=True),
}


@dataclass(slots=True)
class Counts:
    """How often batches were begun and ended, and the device was waited for."""

    begun: int = 0
    ended: int = 0
    synchronised: int = 0


@contextlib.contextmanager
def late_sends() -> Iterator[Counts]:
    """Make every batch of sends late."""
    counts, send_at_once = Counts(), dist.batch_isend_irecv

    def begin(operations: Sequence[dist.P2POp]) -> list[Late]:
        counts.begun += 1
        before = [each.tensor.detach().clone() for each in operations]
        for each in operations:
            if each.op is dist.irecv:
                each.tensor.detach().fill_(torch.nan)

        def finish() -> None:
            for each, sent in zip(operations, before, strict=True):
                is_same = each.op is dist.irecv or torch.equal(each.tensor, sent)
                assert is_same, "what is sent changed before it was waited for"
            for work in send_at_once(list(operations)):
                work.wait()
            counts.ended += 1

        return [Late(finish)]

    def synchronise(*_device: object) -> None:
        counts.synchronised += 1

    with (
        patch.object(dist, "batch_isend_irecv", begin),
        patch.object(torch.cuda, "synchronize", synchronise),
    ):
        yield counts


def run_late(case: Case) -> tuple[Result, Counts]:
    with late_sends() as counts:
        return run_step(case), counts


@pytest.mark.parametrize("name", CASES)
def test_no_stage_needs_more_than_the_wait_for_its_batch(name: str) -> None:
    case = CASES[name]
    wanted = expected(case)
    for result, counts in run_on_ranks(run_late, case.layout, {"case": case}):
        assert_equal(result, wanted)
        # Teacher and student, for each micro-batch; the student back too.
        assert counts.begun == counts.ended >= 3 * case.micro_batches
        assert counts.synchronised == 0
