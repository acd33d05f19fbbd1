"""Two layers of a teacher and a student, and the delta between them by its definition over the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, log_softmax

from megatron_fdd.ops.delta import HeadGrams, delta_cosine
from tests.ops.linear_kl_case import Case, make_case


def reference_cosine(teachers: list[Tensor], students: list[Tensor], *, centred: bool) -> Tensor:
    """Return the cosine of log-probability differences over the vocabulary, from logits [N, V] of two layers each."""
    deltas = [log_softmax(later, -1) - log_softmax(earlier, -1) for earlier, later in (teachers, students)]
    if centred:
        deltas = [delta - delta.mean(-1, keepdim=True) for delta in deltas]
    return cosine_similarity(*deltas, dim=-1, eps=0.0)


@dataclass(frozen=True, slots=True)
class Layers:
    """Normed hidden states of two layers per model and the heads they share; N tokens of this rank."""

    earlier: Case
    later: Case

    def logits(self, model: str, layer: Case) -> Tensor:
        head = getattr(self.earlier, f"{model}_head")[: self.earlier.vocab_size].double()
        return getattr(layer, model).double() @ head.T

    def reference(self, *, centred: bool) -> Tensor:
        models = ("teacher", "student")
        logits = [[self.logits(model, layer) for layer in (self.earlier, self.later)] for model in models]
        return reference_cosine(*logits, centred=centred)

    def cosine(self, grams: HeadGrams, tokens: slice = slice(None)) -> Tensor:
        """Run the operation, with log-sum-exps from whole logits."""
        deltas, lse_deltas = [], []
        for model in ("teacher", "student"):
            earlier, later = (self.logits(model, layer) for layer in (self.earlier, self.later))
            delta = getattr(self.later, model) - getattr(self.earlier, model)
            deltas.append(delta[tokens])
            lse_deltas.append((later.logsumexp(-1) - earlier.logsumexp(-1)).to(delta.dtype)[tokens])
        lse = [None, None] if grams.centred else lse_deltas
        return delta_cosine(*deltas, *lse, grams)


def make_layers(num_tokens: int, vocab_size: int, *, padded: int, dtype: torch.dtype) -> Layers:
    """Make random layers; the student's states and head require gradients."""
    earlier = make_case(num_tokens, vocab_size, padded=padded).to(dtype)
    later = make_case(num_tokens, vocab_size, padded=padded, seed=1).to(dtype)
    for leaf in (earlier.student, later.student, earlier.student_head):
        leaf.requires_grad_()
    return Layers(earlier, later)


def leaves(layers: Layers) -> tuple[Tensor, Tensor, Tensor]:
    return layers.earlier.student, layers.later.student, layers.earlier.student_head
