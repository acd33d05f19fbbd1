"""One case of linear_kl with its float64 reference, whole or as the shards of tensor-parallel ranks.

Shapes: N tokens, V vocabulary, T / D hidden width of teacher / student, P rows of the padded vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_fdd.ops.divergence import DIVERGENCES
from megatron_fdd.ops.head_extras import NO_EXTRAS, HeadExtras
from megatron_fdd.ops.linear_kl import (
    DEFAULT_IMPLEMENTATION,
    Divergence,
    Heads,
    Implementation,
    LinearKL,
    VocabShard,
    linear_kl,
)
from tests.oracle import reference as oracle

KINDS = tuple(DIVERGENCES)


def reference_divergence(teacher_NV: Tensor, student_NV: Tensor, divergence: Divergence) -> Tensor:
    """Return the oracle's value; the oracle shares no code with the package."""
    return oracle.divergence(divergence.kind, divergence.mix, divergence.temperature, teacher_NV, student_NV)


@dataclass(frozen=True, slots=True)
class Case:
    """Inputs over the whole vocabulary, padded rows filled with garbage, and upstream gradients."""

    teacher: Tensor
    teacher_head: Tensor
    student: Tensor
    student_head: Tensor
    labels: Tensor
    upstream: Tensor  # [3, N]: for divergence, student lse, cross-entropy
    vocab_size: int
    teacher_extras: HeadExtras = NO_EXTRAS  # the bias is that of the padded head, float32
    student_extras: HeadExtras = NO_EXTRAS

    def logits(self, model: str) -> Tensor:
        """Compute the logits of the model, "teacher" or "student", in float64, without padding."""
        head, extras = getattr(self, f"{model}_head"), getattr(self, f"{model}_extras")
        logits_NV = getattr(self, model).double() @ head[: self.vocab_size].double().T
        if extras.bias_W is not None:
            logits_NV = logits_NV + extras.bias_W[: self.vocab_size].double()
        cap = extras.cap
        return logits_NV if cap is None else cap * torch.tanh(logits_NV / cap)

    def to(self, dtype: torch.dtype) -> Case:
        """Return the same case with rounded numbers."""
        names = ("teacher", "teacher_head", "student", "student_head")
        return replace(self, **{name: getattr(self, name).to(dtype) for name in names})

    def heads(
        self, student_head: Tensor | None = None, implementation: Implementation = DEFAULT_IMPLEMENTATION
    ) -> Heads:
        """Return both heads on one rank; the student's is the case's unless another is given."""
        head = self.student_head if student_head is None else student_head
        shard = VocabShard(0, self.vocab_size, None)
        return Heads(self.teacher_head, head, shard, implementation, self.teacher_extras, self.student_extras)

    def reference(self, divergence: Divergence | None) -> LinearKL:
        """Compute all outputs in float64, without shards, tiles or padding."""
        teacher_NV, student_NV = self.logits("teacher"), self.logits("student")
        value = reference_divergence(teacher_NV, student_NV, divergence) if divergence else None
        entropy = cross_entropy(student_NV, self.labels, ignore_index=-100, reduction="none")
        return LinearKL(value, teacher_NV.logsumexp(-1), student_NV.logsumexp(-1), entropy)


def make_case(
    num_tokens: int,
    vocab_size: int,
    *,
    padded: int | None = None,
    widths: tuple[int, int] = (12, 7),
    seed: int = 0,
) -> Case:
    """Make a random float64 case with the `widths` of teacher and student; every third label is missing."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    heads = [normal(padded or vocab_size, width) * 2 / math.sqrt(width) for width in widths]
    for head in heads:
        head[vocab_size:] *= 50
    labels = torch.randint(vocab_size, (num_tokens,), generator=generator)
    labels[1::3] = -100
    upstream = 1 + normal(3, num_tokens).abs()
    teacher, student = normal(num_tokens, widths[0]) * 1.5, normal(num_tokens, widths[1])
    return Case(teacher, heads[0], student, heads[1], labels, upstream, vocab_size)


def capped(case: Case, *, cap: float | None = 1.5, biased: bool = True, model: str = "teacher") -> Case:
    """Give a model of a case a cap that bends most logits, and a bias; that of padded rows is not a number."""
    bias = torch.linspace(-1.5, 2.0, len(case.teacher_head))
    bias[case.vocab_size :] = torch.nan
    return replace(case, **{f"{model}_extras": HeadExtras(bias if biased else None, cap)})


def tiles(tile_size: int, block_rows: int = 8192) -> Implementation:
    """Return the implementation in plain torch, with sizes so small that there are several tiles and blocks."""
    return Implementation("torch", tile_size=tile_size, block_rows=block_rows)


def loss(outputs: LinearKL, upstream: Tensor) -> Tensor:
    """Sum all outputs that carry gradient, each token and output with its own weight."""
    terms = (outputs.divergence_N, outputs.student_lse_N, outputs.cross_entropy_N)
    return sum((w * term).sum() for w, term in zip(upstream, terms, strict=True) if term is not None)


class LargestTensor(TorchDispatchMode):
    """The largest number of elements in any tensor that an operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return result


class Products(TorchDispatchMode):
    """A count of the multiplications in matrix products."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if "mm" in name:
            left, right = args[1:3] if name.startswith("addmm") else args[:2]
            self.total += left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


def gradients(total: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of `total`; fail if it does not depend on an input."""
    return torch.autograd.grad(total, inputs)


def error(ours: Tensor, reference: Tensor) -> float:
    """Return the error relative to the reference's norm, or the absolute error if that norm is zero."""
    return ((ours.double() - reference).norm() / (reference.norm() or 1.0)).item()


@dataclass(frozen=True, slots=True)
class RankPart:
    """The part of a case that one tensor-parallel rank of the world group holds."""

    case: Case
    shard: VocabShard
    rows: slice  # of the padded heads
    tokens: slice

    @staticmethod
    def of(case: Case, *, sequence_parallel: bool) -> RankPart:
        rank, size = dist.get_rank(), dist.get_world_size()
        per_rank = len(case.student_head) // size
        rows = slice(rank * per_rank, (rank + 1) * per_rank)
        num_valid = min(max(case.vocab_size - rows.start, 0), per_rank)
        shard = VocabShard(rows.start, num_valid, dist.group.WORLD, sequence_parallel)
        count = len(case.student) // size if sequence_parallel else len(case.student)
        first = rank * count if sequence_parallel else 0
        return RankPart(case, shard, rows, slice(first, first + count))

    def inputs(self, *, live: bool) -> tuple[Tensor, Tensor]:
        """Return student states and head of this rank, as leaves."""
        hidden = self.case.student[self.tokens].clone().requires_grad_()
        return hidden, self.case.student_head[self.rows].clone().requires_grad_(live)

    def heads(self, head: Tensor, implementation: Implementation = DEFAULT_IMPLEMENTATION) -> Heads:
        """Put the teacher's part beside the student's, `head`."""
        extras = [
            each if each.bias_W is None else replace(each, bias_W=each.bias_W[self.rows])
            for each in (self.case.teacher_extras, self.case.student_extras)
        ]
        return Heads(self.case.teacher_head[self.rows], head, self.shard, implementation, *extras)

    def run(
        self,
        hidden: Tensor,
        head: Tensor,
        divergence: Divergence | None,
        implementation: Implementation = DEFAULT_IMPLEMENTATION,
        **options,
    ) -> LinearKL:
        """Run the operation on this rank's part."""
        labels_N = self.case.labels[self.tokens]
        heads = self.heads(head, implementation)
        return linear_kl(
            self.case.teacher[self.tokens], hidden, heads, divergence=divergence, labels_N=labels_N, **options
        )


def reference_gradients(case: Case, divergence: Divergence | None, keep: tuple[bool, ...] = (True,) * 4):
    """Return the reference's kept outputs, and their weighted sum's gradients for hidden states and head."""
    leaves = [x.double().clone().requires_grad_() for x in (case.student, case.student_head)]
    double = replace(case.to(torch.float64), student=leaves[0], student_head=leaves[1])
    outputs = double.reference(divergence)
    outputs = outputs._make(output if kept else None for output, kept in zip(outputs, keep, strict=True))
    return outputs, gradients(loss(outputs, case.upstream), *leaves)


def parameter_of_ddp(head: Tensor) -> torch.nn.Parameter:
    """Make a parameter with the attributes that DistributedDataParallel adds."""
    parameter = torch.nn.Parameter(head.clone())
    parameter.main_grad = torch.full_like(parameter, 3.0, dtype=torch.float32)
    parameter.grad_added_to_main_grad = False
    return parameter
