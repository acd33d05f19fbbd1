"""The reference of a run with two teachers: each sample by its own, in plain float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from tests.oracle import reference
from tests.oracle.reference import Shape, Terms, Weights

# The teacher of each sample of each micro-batch: both in some, one alone in others.
TEACHERS_OF_ROWS = ((0, 1), (1, 1), (1, 0), (0, 0))
# Another depth and width than the first teacher's.
SECOND = Shape(num_layers=7, hidden=40, heads=12, groups=12, head_width=4, ffn=72)


def second_pairs(pairs: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """Return the second teacher's pairs: the same layers of the student, others of the teacher."""
    return tuple((student, 3 + place) for place, (student, _) in enumerate(pairs))


def second_weights(shape: Shape) -> Weights:
    """Return the second teacher's weights in float64; of another shape they are others than the first one's."""
    return reference.double(reference.random_weights(shape, 2), requires_grad=False)


def several_losses(
    terms: Terms,
    student: tuple[Shape, Weights],
    teachers: Mapping[str, tuple[Shape, Weights]],
    batch: dict[str, Tensor],
) -> tuple[Tensor, dict[str, float]]:
    """Return total and means of all tokens, and each teacher's means over its own, "kd code".

    Args:
        batch: of all samples, with "teacher".
    """
    labels, tokens = (
        batch["loss_mask"].sum(),
        (batch["token_mask"] if terms.all_tokens else batch["loss_mask"]).sum(),
    )
    alone = {"ce": replace(terms, kd=0.0, alpha=0.0, beta=0.0), "others": replace(terms, ce=0.0)}
    total, means, sums = Tensor([0.0]).double()[0], {}, dict.fromkeys(("ce", "kd"), 0.0)
    for number, (name, (shape, weights)) in enumerate(teachers.items()):
        own = {key: value[batch["teacher"] == number] for key, value in batch.items()}
        own_terms = terms if number == 0 else replace(terms, pairs=second_pairs(terms.pairs))
        mask = own["token_mask"] if terms.all_tokens else own["loss_mask"]
        shares = {"ce": own["loss_mask"].sum() / labels, "others": mask.sum() / tokens}
        for part, some in alone.items():
            chosen = replace(some, pairs=own_terms.pairs)
            loss, _ = reference.distillation_loss(chosen, (student[0], shape), (student[1], weights), own)
            total = total + loss * shares[part]
        _, found = reference.distillation_loss(own_terms, (student[0], shape), (student[1], weights), own)
        means |= {f"{term} {name}": value for term, value in found.items()}
        sums["ce"] += found["ce"] * float(shares["ce"])
        sums["kd"] += found["kd"] * float(shares["others"])
    return total, {**means, **sums, "total": total.item()}
