"""Two layers of a teacher and a student, and the delta between them by its definition over the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, log_softmax

from megatron_fdd.ops.capped_cosine import capped_cosine
from megatron_fdd.ops.delta import HeadGrams, capped_change, delta_cosine
from megatron_fdd.ops.heads import Heads
from megatron_fdd.ops.logit_changes import Ends
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
        heads = {name: getattr(self.earlier, name) for name in ("teacher_head", "student_head")}
        return replace(layer, **heads).logits(model)

    def reference(self, *, centred: bool, detached: bool = False) -> Tensor:
        """Return the definition's value; `detached`: the earlier end is a constant, with head and log-sum-exp."""
        logits = []
        for model in ("teacher", "student"):
            earlier, later = (self.logits(model, layer) for layer in (self.earlier, self.later))
            logits.append([earlier.detach() if detached else earlier, later])
        return reference_cosine(*logits, centred=centred)

    def cosine(
        self,
        grams: HeadGrams,
        tokens: slice = slice(None),
        *,
        centred: bool,
        detached: bool = False,
        capped: Heads | None = None,
    ) -> Tensor:
        """Run the operation, with log-sum-exps from whole logits; `capped`: the heads, if the teacher's has a cap."""
        deltas, lse_deltas = [], []
        for model in ("teacher", "student"):
            before, after = getattr(self.earlier, model), getattr(self.later, model)
            lse_before, lse_after = (
                self.logits(model, layer).logsumexp(-1).to(after.dtype)
                for layer in (self.earlier, self.later)
            )
            if detached:
                before, lse_before = before.detach(), lse_before.detach()
            deltas.append((after - before)[tokens])
            lse_deltas.append((lse_after - lse_before)[tokens])
        lse = [None, None] if centred else lse_deltas
        later_ND = self.later.student[tokens] if detached else None
        teacher, student = deltas
        if capped is not None:
            teacher = capped_change(self.earlier.teacher[tokens], self.later.teacher[tokens], capped, grams)
        return delta_cosine(teacher, student, *lse, grams, student_later_ND=later_ND)

    def capped_cosine(
        self, heads: Heads, tokens: slice = slice(None), *, centred: bool, detached: bool = False
    ) -> Tensor:
        """Run the operation for a student with a cap, as `cosine` does."""
        ends, lse_deltas = [], []
        for model in ("teacher", "student"):
            before, after = getattr(self.earlier, model), getattr(self.later, model)
            lse_before, lse_after = (
                self.logits(model, layer).logsumexp(-1).to(after.dtype)
                for layer in (self.earlier, self.later)
            )
            if detached:
                before, lse_before = before.detach(), lse_before.detach()
            ends.append(Ends(before[tokens], after[tokens]))
            lse_deltas.append((lse_after - lse_before)[tokens])
        lse = None if centred else (lse_deltas[0], lse_deltas[1])
        return capped_cosine(*ends, lse, heads, is_earlier_constant=detached)


def make_layers(num_tokens: int, vocab_size: int, *, padded: int, dtype: torch.dtype) -> Layers:
    """Make random layers; the student's states and head require gradients."""
    earlier = make_case(num_tokens, vocab_size, padded=padded).to(dtype)
    later = make_case(num_tokens, vocab_size, padded=padded, seed=1).to(dtype)
    for leaf in (earlier.student, later.student, earlier.student_head):
        leaf.requires_grad_()
    return Layers(earlier, later)


def leaves(layers: Layers) -> tuple[Tensor, Tensor, Tensor]:
    return layers.earlier.student, layers.later.student, layers.earlier.student_head
