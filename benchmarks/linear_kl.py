"""Time and memory of the losses: plain torch, ours, Liger's fused loss, and the bare matrix products as the floor.

    python -m benchmarks.linear_kl                      # the size that the targets are for
    python -m benchmarks.linear_kl --vocab 128000       # memory must not follow the vocabulary

Forward KL, float32, forward and backward, heads constant (`--fdd-lens-head detached`) except where a row says that
the head is trained. Exits 1 when repeats differ too much for a ratio.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Measurement, machine, measure, record, table
from megatron_fdd.ops.delta import delta_cosine, head_grams
from megatron_fdd.ops.linear_kl import Divergence, VocabShard, linear_kl

Step = Callable[[], object]
FLOOR = "bare matrix products"


@dataclass(frozen=True)
class Size:
    """What is computed: K sampled layers of both models."""

    tokens: int
    vocab: int
    teacher_width: int
    student_width: int
    layers: int


@dataclass(frozen=True)
class Inputs:
    """Both heads, and the features of every sampled layer, student's with gradient."""

    teacher_head_WT: Tensor
    student_head_WS: Tensor
    teacher: list[Tensor]
    student: list[Tensor]

    @property
    def shard(self) -> VocabShard:
        return VocabShard(0, len(self.teacher_head_WT), None)


def inputs(size: Size, *, trains_head: bool = False) -> Inputs:
    """Random features whose logits have a standard deviation of 2."""
    torch.manual_seed(0)
    head_T = torch.randn(size.vocab, size.teacher_width) * 2 / size.teacher_width**0.5
    head_S = torch.randn(size.vocab, size.student_width) * 2 / size.student_width**0.5
    return Inputs(
        head_T,
        head_S.requires_grad_(trains_head),
        [torch.randn(size.tokens, size.teacher_width) for _ in range(size.layers)],
        [torch.randn(size.tokens, size.student_width).requires_grad_() for _ in range(size.layers)],
    )


def bare_products(size: Size) -> Step:
    """What no implementation of the objective can leave out: four products a layer."""
    given = inputs(size)

    @torch.no_grad()
    def run() -> None:
        for teacher, student in zip(given.teacher, given.student, strict=True):
            teacher_logits, student_logits = (
                teacher @ given.teacher_head_WT.T,
                student @ given.student_head_WS.T,
            )
            _ = teacher_logits @ given.student_head_WS, student_logits @ given.student_head_WS

    return run


def plain_objective(size: Size) -> Step:
    """Trajectory and delta as one writes them down: log-probabilities of every layer and model."""
    given = inputs(size)

    def run() -> None:
        teacher = [F.log_softmax(hidden @ given.teacher_head_WT.T, -1) for hidden in given.teacher]
        student = [F.log_softmax(hidden @ given.student_head_WS.T, -1) for hidden in given.student]
        terms = [
            F.kl_div(s, t, log_target=True, reduction="none").sum(-1).mean()
            for s, t in zip(student, teacher, strict=True)
        ]
        for j in range(1, size.layers):
            cosine = F.cosine_similarity(teacher[j] - teacher[j - 1], student[j] - student[j - 1], dim=-1)
            terms.append((1 - cosine).mean())
        torch.stack(terms).sum().backward()

    return run


def our_objective(size: Size) -> Step:
    """The same terms by the package's operations, Gram matrices (once a step) included."""
    given = inputs(size)

    def run() -> None:
        grams = head_grams(given.teacher_head_WT, given.student_head_WS, shard=given.shard, centred=False)
        outputs = [
            linear_kl(
                teacher,
                given.teacher_head_WT,
                student,
                given.student_head_WS,
                shard=given.shard,
                divergence=Divergence(),
            )
            for teacher, student in zip(given.teacher, given.student, strict=True)
        ]
        terms = [output.divergence_N.mean() for output in outputs if output.divergence_N is not None]
        for j in range(1, size.layers):
            now, before = outputs[j], outputs[j - 1]
            cosine = delta_cosine(
                given.teacher[j] - given.teacher[j - 1],
                given.student[j] - given.student[j - 1],
                now.teacher_lse_N - before.teacher_lse_N,
                now.student_lse_N - before.student_lse_N,
                grams,
            )
            terms.append((1 - cosine).mean())
        torch.stack(terms).sum().backward()

    return run


def bare_trained(size: Size) -> Step:
    """One layer whose head is trained too: both logits and two products for the gradients."""
    given = inputs(size)

    @torch.no_grad()
    def run() -> None:
        teacher, student = given.teacher[0], given.student[0]
        _, student_logits = teacher @ given.teacher_head_WT.T, student @ given.student_head_WS.T
        _ = student_logits @ given.student_head_WS, student_logits.T @ student

    return run


def our_trained(size: Size) -> Step:
    """One layer, head trained: `linear_kl` alone."""
    given = inputs(size, trains_head=True)

    def run() -> None:
        output = linear_kl(
            given.teacher[0],
            given.teacher_head_WT,
            given.student[0],
            given.student_head_WS,
            shard=given.shard,
            divergence=Divergence(),
            needs_lse=False,
        )
        assert output.divergence_N is not None
        output.divergence_N.mean().backward()

    return run


def liger_trained(size: Size) -> Step:
    """Liger's fused linear JSD at beta 0, which is forward KL; it always trains the head."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    given = inputs(size, trains_head=True)
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False)
    labels = torch.zeros(size.tokens, dtype=torch.int64)

    def run() -> None:
        loss(
            given.student[0], given.student_head_WS, given.teacher[0], given.teacher_head_WT, labels
        ).backward()

    return run


OBJECTIVE: dict[str, Callable[[Size], Step]] = {
    FLOOR: bare_products,
    "plain torch": plain_objective,
    "megatron_fdd": our_objective,
}
TRAINED: dict[str, Callable[[Size], Step]] = {FLOOR: bare_trained, "megatron_fdd": our_trained}


def compare(title: str, makers: dict[str, Callable[[Size], Step]], size: Size, repeats: int) -> bool:
    """Measure, print and record. Returns whether every repeat was steady."""
    rows: dict[str, Measurement] = {}
    for name, make in makers.items():
        rows[name] = measure(lambda make=make: make(size), repeats)  # type: ignore[misc]
    print(f"\n{title}\n{table(rows, FLOOR)}", flush=True)
    values: dict[str, Any] = {name: getattr(size, name) for name in size.__dataclass_fields__}
    record(title, values, rows)
    return all(row.is_steady for row in rows.values())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1024, help="rows of features (%(default)s)")
    parser.add_argument("--vocab", type=int, default=32000, help="rows of both heads (%(default)s)")
    parser.add_argument("--teacher-width", type=int, default=768, help="(%(default)s)")
    parser.add_argument("--student-width", type=int, default=384, help="(%(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="sampled layers, at least 2 (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="of which the median counts (%(default)s)")
    args = parser.parse_args()
    size = Size(args.tokens, args.vocab, args.teacher_width, args.student_width, args.layers)
    print(f"{machine()}; torch {torch.__version__}; {size}")
    makers = dict(TRAINED)
    if importlib.util.find_spec("liger_kernel") is None:
        print("liger_kernel is not installed (pip install liger-kernel): left out")
    else:
        makers["Liger's LigerFusedLinearJSDLoss"] = liger_trained
    steady = compare(f"objective, {size.layers} layers, constant heads", OBJECTIVE, size, args.repeats)
    steady &= compare("linear_kl, one layer, trained head", makers, size, args.repeats)
    if not steady:
        print("repeats differ by more than 5 %: the machine is not quiet enough for a ratio", file=sys.stderr)
    return 0 if steady else 1


if __name__ == "__main__":
    sys.exit(main())
