"""The costs of a step besides its arithmetic: every send with its size, and every collective.

The package's docstrings promise these numbers. The student's schedule is compared with the same schedule on the
same chunks without distillation.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import patch

import pytest
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_fdd.host.topology import Topology
from megatron_fdd.losses import objective, tap
from megatron_fdd.step import schedule
from megatron_fdd.step.lens_copies import LensCopies
from megatron_fdd.step.teacher import check
from megatron_fdd.step.teacher.pipelined import PipelinedTeacher
from megatron_fdd.step.trained_lens import TrainedLens
from tests.harness.ranks import run_on_ranks
from tests.harness.traffic import COLLECTIVES, SENDS, Message, Traffic
from tests.oracle import case as layouts
from tests.oracle.case import LENGTH, MICRO_BATCH, MICRO_BATCHES, Case, run_step
from tests.oracle.plain_training import train_plainly
from tests.oracle.reference import STUDENT, Terms

pytestmark = pytest.mark.tier("default")

TERMS = Terms()  # taps at student blocks 1, 3 and 4
ROWS = (LENGTH, MICRO_BATCH, STUDENT.hidden)
N = LENGTH * MICRO_BATCH
# A boundary with a carry has the hidden states twice, and 2 log-sum-exps for each of N tokens: half a row of [B, H]
# in float32, one and a half in bf16 (three numbers for one).
WIDE, WIDE_BF16 = (2 * LENGTH + 1, *ROWS[1:]), (2 * LENGTH + 2, *ROWS[1:])


def groups_of(topology: Topology) -> dict[str, Any]:
    return {
        "tensor": topology.tensor_group,
        "pipeline": topology.pipeline_group,
        "rows": topology.rows_group,
    }


@contextlib.contextmanager
def named_phases(traffic: Traffic) -> Iterator[None]:
    """Record the parts of a step, each under its name; the rest is "step"."""

    def student_schedule() -> Any:
        return traffic.in_phase("student", get_forward_backward_func())

    places = [
        (schedule.StepHooks, "run", "step"),
        (PipelinedTeacher, "run", "teacher"),
        (PipelinedTeacher, "_exchange", "exchange"),
        (LensCopies, "refresh", "lens"),
        (TrainedLens, "send_home", "live"),
        (schedule, "add_up", "means"),
        (check, "log_cross_entropy", "first batch"),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, phase in places:
            stack.enter_context(patch.object(owner, name, traffic.in_phase(phase, getattr(owner, name))))
        stack.enter_context(patch.object(layouts, "get_forward_backward_func", student_schedule))
        yield


def distil(case: Case) -> list[Message]:
    """Return, on every rank, the messages of one step of distillation; building the models is not recorded."""
    traffic = Traffic()
    traffic.groups = groups_of(Topology.from_megatron(sequence_parallel=case.sequence_parallel))
    with named_phases(traffic), traffic.watching():
        run_step(case)
    return traffic.messages


def say_plainly(case: Case) -> list[Message]:
    """Return, on every rank, the messages of stock Megatron, all in the student's phase."""
    traffic = Traffic()
    traffic.groups = groups_of(Topology.from_megatron(sequence_parallel=case.sequence_parallel))
    with traffic.watching(), traffic.phase("student"):
        train_plainly(case)
    return traffic.messages


def watched(case: Case, body: Any = distil) -> list[list[Message]]:
    """Return the messages of each rank, which is a stage if there is one replica and no tensor parallelism."""
    return run_on_ranks(body, case.layout, {"case": case})


def sends(messages: Sequence[Message], *phases: str) -> list[tuple[tuple[int, ...], int]]:
    """Return shape and bytes of everything sent in these phases, in order."""
    return [(each.shape, each.num_bytes) for each in messages if each.phase in phases and each.kind in SENDS]


def collectives(messages: Sequence[Message], phase: str) -> Counter[tuple[str, str, int]]:
    """Count the package's own collectives of a phase, by kind, group and bytes (for an all-gather, of the result)."""
    return Counter(
        (each.kind, each.group, each.num_bytes)
        for each in messages
        if each.phase == phase and each.is_ours and each.kind in COLLECTIVES
    )


FAR_APART = Terms(pairs=((1, 1), (5, 9)))


@pytest.mark.parametrize("pp", [2, 4])
@pytest.mark.parametrize(
    "terms", [Terms(beta=0.0), Terms(pairs=((1, 1), (2, 2)), beta=0.0), Terms(alpha=0, beta=0)]
)
def test_without_a_delta_the_schedule_sends_what_plain_megatron_sends(pp: int, terms: Terms) -> None:
    case = Case(pp=pp, terms=terms)
    for ours, plain in zip(watched(case), watched(case, say_plainly), strict=True):
        assert sends(ours, "student") == sends(plain, "student")
        assert sends(plain, "student")
        assert not collectives(ours, "student")


def boundaries(messages: Sequence[Sequence[Message]]) -> list[Counter[tuple[int, ...]]]:
    """Count what each stage sends in the student's schedule, activations and gradients, by shape."""
    return [Counter(shape for shape, _ in sends(stage, "student")) for stage in messages]


M = MICRO_BATCHES
# Four stages have blocks 1-2, 3-4, 5 and 6; two have 1-3 and 4-6. A stage sends forward M times, and back M times.
CARRIES = {
    "pp4": (Case(pp=4), [{WIDE: M}, {WIDE: M, ROWS: M}, {ROWS: 2 * M}, {ROWS: M}]),
    "pp4-far-apart": (
        Case(pp=4, terms=FAR_APART),
        [{WIDE: M}, {WIDE: 2 * M}, {WIDE: M, ROWS: M}, {ROWS: M}],
    ),
    "pp4-early": (
        Case(pp=4, terms=Terms(pairs=((1, 1), (2, 2)))),
        [{ROWS: M}, {ROWS: 2 * M}, {ROWS: 2 * M}, {ROWS: M}],
    ),
    "pp4-late": (
        Case(pp=4, terms=Terms(pairs=((5, 9), (6, 10)))),
        [{ROWS: M}, {ROWS: 2 * M}, {ROWS: M, WIDE: M}, {WIDE: M}],
    ),
    "pp2": (Case(pp=2), [{WIDE: M}, {WIDE: M}]),
    "pp2-bf16": (Case(pp=2, bf16=True), [{WIDE_BF16: M}, {WIDE_BF16: M}]),
    "pp2-centred": (
        Case(pp=2, terms=Terms(centred=True)),
        [{(2 * LENGTH, *ROWS[1:]): M}, {(2 * LENGTH, *ROWS[1:]): M}],
    ),
}


@pytest.mark.parametrize("name", CARRIES)
def test_only_boundaries_between_taps_are_wider(name: str) -> None:
    case, wanted = CARRIES[name]
    ours, plain = watched(case), watched(case, say_plainly)
    assert boundaries(ours) == wanted
    for stage, plain_stage in zip(ours, plain, strict=True):
        assert len(sends(stage, "student")) == len(sends(plain_stage, "student"))
        width = 2 if case.bf16 else 4
        for shape, num_bytes in sends(stage, "student"):
            assert num_bytes == width * torch.Size(shape).numel()


def test_what_is_sent_once_a_step() -> None:
    """A step sends the teacher's hidden states, each micro-batch's taps to stages that need them, and copied heads."""
    teacher_rows = (LENGTH, MICRO_BATCH, layouts.TEACHER.hidden)
    head, norm = (52, STUDENT.hidden), (STUDENT.hidden,)
    # Teacher stages have blocks 1-3, 4-6, 7-8, 9-10 and taps 2, 6, 8; the student's stages need (0), (0 1 2), (), ().
    stages = watched(Case(pp=4))
    assert [sends(stage, "exchange") for stage in stages] == [
        M * [(teacher_rows, 4 * torch.Size(teacher_rows).numel())],
        [],
        M * [(teacher_rows, 4 * torch.Size(teacher_rows).numel())],
        [],
    ]
    assert [Counter(shape for shape, _ in sends(stage, "teacher")) for stage in stages] == [
        Counter({teacher_rows: M}) if stage < 3 else Counter() for stage in range(4)
    ]
    teacher_head = [(52, layouts.TEACHER.hidden), (layouts.TEACHER.hidden,)]
    # Stages 0 and 1 tap and get heads: the teacher's when the models are joined, the student's in the step.
    for stage in stages:
        copied = [(each.kind, each.shape) for each in stage if each.phase == "lens"]
        assert copied == [("broadcast", shape) for shape in (*teacher_head, head, norm)]
        assert not sends(stage, "step", "means")
        assert collectives(stage, "means") == {
            ("all_reduce", "rows", 9 * 4): 1,
            ("all_reduce", "pipeline", 9 * 4): 1,
        }
        assert not collectives(stage, "step")


def count_synchronisations(case: Case) -> int:
    """Count, on every rank, how often the host waits for the device while the teacher runs ahead."""
    real_run = PipelinedTeacher.run
    count = 0

    def run(self: PipelinedTeacher, *arguments: Any) -> None:
        nonlocal count
        with patch.object(torch.cuda, "synchronize") as synchronize:
            real_run(self, *arguments)
        count += synchronize.call_count

    with patch.object(PipelinedTeacher, "run", run):
        run_step(case)
    return count


def test_the_host_does_not_wait_for_the_teacher() -> None:
    case = Case(pp=2)
    assert run_on_ranks(count_synchronisations, case.layout, {"case": case}) == [0, 0]


def head_collectives(
    case: Case, calls: int, *, labels: bool = False, per_token: int
) -> Counter[tuple[str, str, int]]:
    """Count as the docstrings of `linear_kl` (3 numbers per token) and `head_loss` (2) say, for fkl on two ranks."""
    ranks, numbers, width = 2, 6 if labels else 5, 2 if case.bf16 else 4
    found: Counter[tuple[str, str, int]] = Counter()
    found["all_gather_into_tensor", "tensor", ranks * numbers * N * 4] += calls
    if not case.sequence_parallel:
        found["all_reduce", "tensor", N * S * width] += calls
        return found
    labels_bytes = [N * 8] if labels else []
    for gathered in (N * T * width, N * S * width, N * per_token * 4, *labels_bytes):
        found["all_gather_into_tensor", "tensor", gathered] += calls
    found["reduce_scatter_tensor", "tensor", N // ranks * S * width] += calls
    return found


def delta_collectives(case: Case, calls: int) -> Counter[tuple[str, str, int]]:
    """Count as the docstring of `delta_cosine` says for log-probabilities, forward and backward."""
    found: Counter[tuple[str, str, int]] = Counter()
    if not case.sequence_parallel:
        found["all_gather_into_tensor", "tensor", N * 4] += calls
        found["all_gather_into_tensor", "tensor", N * (S + 1) * 4] += calls
    return found


T, S = layouts.TEACHER.hidden, STUDENT.hidden
GRAMS = (T + S + 1, T * T + T * S + S * S)


@pytest.mark.parametrize(("sequence_parallel", "bf16"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(
    ("terms", "taps", "deltas"),
    [
        (TERMS, (2, 1), (True, True)),
        (Terms(beta=0.0), (2, 1), (False, False)),
        (Terms(pairs=((4, 6), (6, 10))), (0, 2), (False, True)),
        (Terms(pairs=((1, 1), (3, 3)), kd=0.0), (2, 0), (True, False)),
    ],
)
def test_collectives_of_the_tensor_group(
    terms: Terms, taps: tuple[int, int], deltas: tuple[bool, bool], sequence_parallel: bool, bf16: bool
) -> None:
    """Each tap and micro-batch has one pass and one delta, each step one computation of Grams; without taps nothing."""
    case = Case(tp=2, pp=2, sequence_parallel=sequence_parallel, terms=terms, bf16=bf16)
    for rank, messages in enumerate(watched(case)):
        stage = rank // case.tp
        wanted = head_collectives(case, taps[stage] * M, per_token=3 if terms.beta else 2)
        if deltas[stage]:
            for numbers in GRAMS:
                wanted["all_reduce", "tensor", numbers * 4] += 1
            wanted += delta_collectives(case, M)
        if stage == 1 and terms.kd > 0:
            wanted += head_collectives(case, M, labels=True, per_token=2)
        assert collectives(messages, "student") == +wanted
        assert not collectives(messages, "step")


def count_sweeps(case: Case) -> int:
    """Return, on every rank, how often a step sweeps the vocabulary."""
    with (
        patch.object(tap, "linear_kl", wraps=tap.linear_kl) as taps,
        patch.object(tap, "head_loss", wraps=tap.head_loss) as sums,
        patch.object(objective, "head_loss", wraps=objective.head_loss) as final,
    ):
        run_step(case)
    return taps.call_count + sums.call_count + final.call_count


def test_no_projection_is_done_twice() -> None:
    """Each tap and the final logits have one sweep; a stage that only passes a carry on has none."""
    case = Case(pp=4, terms=FAR_APART)
    assert run_on_ranks(count_sweeps, case.layout, {"case": case}) == [M, 0, M, M]


def test_a_live_lens_goes_home_once_a_step() -> None:
    stages = watched(Case(pp=2, terms=Terms(live=True)))
    head, norm = (52, STUDENT.hidden), (STUDENT.hidden,)
    assert [[shape for shape, _ in sends(stage, "live")] for stage in stages] == [[head, norm], []]
    assert [collectives(stage, "live") for stage in stages] == [
        {("all_reduce", "rows", 52 * S * 4): 1, ("all_reduce", "rows", S * 4): 1},
        {},
    ]
