"""Several layers of both models with one pair of heads, and the loss of their terms by its definition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_fdd.ops.delta import head_grams
from megatron_fdd.ops.heads import Heads
from megatron_fdd.ops.inner_loss import InnerLayer, InnerTerms, LayerSums, inner_loss
from megatron_fdd.ops.linear_kl import Divergence
from tests.ops.delta_case import reference_cosine
from tests.ops.linear_kl_case import Case, gradients, make_case, reference_divergence

FACTOR = 3.0


@dataclass(frozen=True, slots=True)
class Inner:
    """Layers in depth order, what is asked for of each, and which of them have their log-sum-exps from elsewhere."""

    layers: tuple[Case, ...]
    divergence: Divergence | None = Divergence()
    divergences: tuple[float | None, ...] = (0.7, 0.7, 0.7)
    deltas: tuple[float | None, ...] = (None, 0.4, 0.9)
    given: tuple[int, ...] = ()
    detaches: bool = False

    @property
    def weights(self) -> Tensor:
        """Weights that differ for every token; every fifth has weight 0."""
        weights_N = self.layers[0].upstream[0].clone()
        weights_N[::5] = 0
        return weights_N

    def reference(self, students: Sequence[Tensor]) -> tuple[Tensor, list[LayerSums]]:
        """Compute loss and sums in float64 from whole logits."""
        total, sums = torch.zeros((), dtype=torch.float64), []
        logits = [
            (layer.logits("teacher"), replace(layer, student=student).logits("student"))
            for layer, student in zip(self.layers, students, strict=True)
        ]
        for index, (teacher_NV, student_NV) in enumerate(logits):
            divergence = delta = None
            if self.divergences[index] is not None and index not in self.given:
                value_N = reference_divergence(teacher_NV, student_NV, self.divergence)
                divergence = (value_N * self.weights).sum()
                total = total + self.divergences[index] * divergence
            if self.deltas[index] is not None:
                before = [each.detach() if self.detaches else each for each in logits[index - 1]]
                pairs = [before[0], teacher_NV], [before[1], student_NV]
                delta = ((1 - reference_cosine(*pairs, centred=False)) * self.weights).sum()
                total = total + self.deltas[index] * delta
            sums.append(LayerSums(divergence, delta))
        return total, sums

    def run(
        self, heads: Heads, students: Sequence[Tensor], rows: slice = slice(None)
    ) -> tuple[Tensor, list[LayerSums]]:
        """Run the operation on some tokens; of layers whose log-sum-exps are given, they come from whole logits."""
        device = students[0].device
        layers = []
        for index, (layer, student) in enumerate(zip(self.layers, students, strict=True)):
            lse = None
            if index in self.given:
                lse = (
                    layer.logits("teacher").logsumexp(-1)[rows].to(student),
                    replace(layer, student=student).logits("student").logsumexp(-1).to(student.dtype),
                )
            layers.append(
                InnerLayer(
                    layer.teacher[rows].to(student),
                    student,
                    None if lse else self.divergences[index],
                    self.deltas[index],
                    lse,
                )
            )
        weights_N = self.weights[rows].to(device, students[0].dtype)
        return inner_loss(
            layers, heads, head_grams(heads), InnerTerms(self.divergence, weights_N, self.detaches)
        )


def make_layers(
    count: int, num_tokens: int, vocab_size: int, *, padded: int | None = None
) -> tuple[Case, ...]:
    """Make layers that share the heads of the first, in float64."""
    cases = [make_case(num_tokens, vocab_size, padded=padded, seed=seed) for seed in range(count)]
    heads = {name: getattr(cases[0], name) for name in ("teacher_head", "student_head")}
    return tuple(replace(case, **heads) for case in cases)


def leaves_of(inner: Inner, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return the student's features of each layer."""
    return [layer.student.detach().to(dtype).clone().requires_grad_() for layer in inner.layers]


def reference_of(inner: Inner) -> tuple[Tensor, list[LayerSums], tuple[Tensor, ...]]:
    """Return loss, sums, and the gradients of FACTOR times the loss, 0 for a layer that it does not depend on."""
    leaves = leaves_of(inner)
    total, sums = inner.reference(leaves)
    found = torch.autograd.grad(FACTOR * total, leaves, allow_unused=True, materialize_grads=True)
    return total.detach(), sums, found


def gradients_of(total: Tensor, students: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return gradients(FACTOR * total, *students)
