"""Late collectives on streams, with one GPU: the demands of NCCL's asynchronous collectives on the operations.

The tests use a stand-in for a group of two ranks, which are both this process. Each collective poisons its output on
the current stream; a side stream waits for that, sleeps, and only then reads the input and writes. `wait` makes the
current stream wait, not the host. If a result is used before its `wait`, or memory is reused while a collective still
needs it, the numbers differ from those of immediate collectives. Without a GPU there is one stream, and the work is
done in `wait`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fdd.ops.delta import delta_cosine, head_grams
from megatron_fdd.ops.head_loss import LossWeights, head_loss
from megatron_fdd.ops.implementation import Implementation
from megatron_fdd.ops.inner_loss import InnerLayer, InnerTerms, inner_loss
from megatron_fdd.ops.linear_kl import Divergence, Heads, VocabShard, linear_kl
from tests.ops.linear_kl_case import gradients, loss, make_case

RUNS_WITHOUT_A_GPU = True
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
RANKS = 2
# Cycles of the GPU's clock, more than the launch of a block's kernels takes.
SLEEP = 2_000_000


class Group:
    """The part of a process group that `VocabShard` uses."""

    def size(self) -> int:
        return RANKS

    def rank(self) -> int:
        return 0


class Work:
    """A stand-in for torch's `Work`, with NCCL's promises about memory and order."""

    def __init__(self, run: Callable[[], None], stream: torch.cuda.Stream | None, *used: Tensor) -> None:
        self._run, self._used, self._done = run, used, None
        if stream is not None:
            begun = torch.cuda.Event()
            begun.record()
            with torch.cuda.stream(stream):
                stream.wait_event(begun)
                torch.cuda._sleep(SLEEP)
                run()
                self._done = torch.cuda.Event()
                self._done.record(stream)

    def wait(self) -> None:
        if self._done is None:
            self._run()
        else:
            torch.cuda.current_stream().wait_event(self._done)
        self._used = ()


class Collectives:
    """The collectives of `torch.distributed` that the operations use, among two ranks that are both this process."""

    def __init__(self, *, late: bool) -> None:
        self._late = late
        self._stream = torch.cuda.Stream() if late and ON_GPU else None
        self.count = 0

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce"):
                stack.enter_context(patch.object(dist, name, getattr(self, name)))
            yield
        if ON_GPU:
            torch.cuda.synchronize()

    def all_gather_into_tensor(
        self, out: Tensor, given: Tensor, group: Group, async_op: bool = False
    ) -> Work | None:
        def run() -> None:
            out.view(RANKS, *given.shape).copy_(given.expand(RANKS, *given.shape))

        return self._begin(run, out, given, async_op)

    def reduce_scatter_tensor(
        self, out: Tensor, given: Tensor, group: Group, async_op: bool = False
    ) -> Work | None:
        return self._begin(lambda: out.copy_(RANKS * given[: len(out)]), out, given, async_op)

    def all_reduce(self, tensor: Tensor, group: Group, async_op: bool = False) -> Work | None:
        given = tensor.clone()
        return self._begin(lambda: tensor.copy_(RANKS * given), tensor, given, async_op)

    def _begin(self, run: Callable[[], object], out: Tensor, given: Tensor, async_op: bool) -> Work | None:
        self.count += 1
        if not (self._late and async_op):
            run()
            return Work(lambda: None, None) if async_op else None
        if out.is_floating_point():
            out.fill_(float("nan"))
        else:
            out.fill_(torch.iinfo(out.dtype).min)
        return Work(run, self._stream, out, given)


def results(*, sequence_parallel: bool, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return values and gradients of all operations, with several blocks of tokens and this device's kernels."""
    case = make_case(256, 3000, widths=(64, 48)).to(dtype)
    shard = VocabShard(0, 3000, Group(), sequence_parallel)
    teacher, teacher_head = case.teacher.to(DEVICE), case.teacher_head.to(DEVICE)
    labels, upstream = case.labels.to(DEVICE), case.upstream.to(DEVICE, torch.float32)
    student = case.student.to(DEVICE).requires_grad_()
    head = case.student_head.to(DEVICE).requires_grad_()
    heads = Heads(teacher_head, head, shard, Implementation(tile_size=512, block_rows=64))
    outputs = linear_kl(teacher, student, heads, divergence=Divergence("jsd"), labels_N=labels)
    found = [*outputs, *gradients(loss(outputs, upstream), student, head)]
    final = head_loss(
        teacher,
        student,
        replace(heads, implementation=Implementation(held_logits=64 * 3000)),
        divergence=Divergence(),
        labels_N=labels,
        weights=LossWeights(upstream[0], upstream[2], 1.0, 1.0),
    )
    found += [*final, *gradients(final.loss, student, head)]
    grams = head_grams(heads)
    lse_N = torch.ones(256, device=DEVICE)
    deltas = (teacher.float(), student.float())
    cosine_N = delta_cosine(*deltas, lse_N, 2 * lse_N, grams)
    found += [cosine_N, *gradients(cosine_N.sum(), student, head)]
    constant = replace(
        heads, student_WD=head.detach(), implementation=Implementation(held_logits=2 * 64 * 3000)
    )
    layers = [
        InnerLayer(teacher.float(), student.float(), 1.0),
        InnerLayer(2 * teacher.float(), student.float().flip(1), 1.0, 1.0),
    ]
    total, _ = inner_loss(layers, constant, head_grams(constant), InnerTerms(Divergence(), upstream[0]))
    found += [total, *gradients(total, student)]
    return tuple(each.detach() for each in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_late_collectives_change_nothing(sequence_parallel: bool, dtype: torch.dtype) -> None:
    found = []
    for late in (False, True):
        collectives = Collectives(late=late)
        with collectives.installed():
            found.append(results(sequence_parallel=sequence_parallel, dtype=dtype))
        assert collectives.count >= 15
    for at_once, late in zip(*found, strict=True):
        assert at_once.isfinite().all()
        assert torch.equal(at_once, late)


def test_a_missing_wait_is_noticed() -> None:
    collectives = Collectives(late=True)
    with collectives.installed(), patch.object(Work, "wait", lambda self: None):
        assert any(each.isnan().any() for each in results(sequence_parallel=False, dtype=torch.float32))
