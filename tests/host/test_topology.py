"""Groups that a teacher has for itself."""

from __future__ import annotations

from datetime import timedelta
from unittest.mock import patch

import pytest
import torch.distributed as dist

from megatron_fdd.host.topology import Topology, _timeout_of
from tests.harness.ranks import distributed

pytestmark = pytest.mark.tier("default")


@distributed(dp=2)
def test_a_teachers_expert_groups_wait_as_long_as_the_students() -> None:
    student = Topology.from_megatron(sequence_parallel=False)
    given = timedelta(seconds=77)
    assert _timeout_of(dist.new_group(timeout=given)) == given
    with patch("megatron_fdd.host.topology._timeout_of", return_value=given) as asked:
        teacher = student.with_experts(2)
    assert asked.call_args.args == (student.collection.ep,)
    assert [_timeout_of(getattr(teacher.collection, name)) for name in ("ep", "tp_ep", "expt_dp")] == [
        given
    ] * 3
