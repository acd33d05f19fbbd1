"""The code of docs/library.md, as it stands there, against plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, log_softmax

from tests.harness.markdown import ROOT, Page

TOKENS, VOCABULARY, TEACHER_WIDTH, STUDENT_WIDTH = 13, 37, 12, 8


@pytest.fixture(scope="module")
def documented() -> Callable[..., Tensor]:
    """The function of the page's one block of Python."""
    (block,) = Page(ROOT / "docs/library.md").blocks("python")
    names: dict[str, Callable[..., Tensor]] = {}
    exec(block, names)
    return names["distillation_loss"]


def plain(
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    teacher_head: Tensor,
    student_head: Tensor,
    labels: Tensor,
) -> Tensor:
    """The same with all logits."""
    heads = (student_head.detach(), student_head.detach(), student_head)
    log_t = [log_softmax(hidden @ teacher_head.T, -1) for hidden in teacher]
    log_s = [log_softmax(hidden @ head.T, -1) for hidden, head in zip(student, heads, strict=True)]
    first, second, final = ((t.exp() * (t - s)).sum(-1) for t, s in zip(log_t, log_s, strict=True))
    delta = 1 - cosine_similarity(log_t[1] - log_t[0], log_s[1] - log_s[0], dim=-1)
    return (final + (first + second) / 2 + delta)[labels >= 0].mean()


def test_the_documented_loss_is_plain_torchs(documented: Callable[..., Tensor]) -> None:
    """Value and gradients, of features and head."""
    draw = torch.Generator().manual_seed(0)
    teacher = [torch.randn(TOKENS, TEACHER_WIDTH, generator=draw) for _ in range(3)]
    student = [torch.randn(TOKENS, STUDENT_WIDTH, generator=draw, requires_grad=True) for _ in range(3)]
    teacher_head = torch.randn(VOCABULARY, TEACHER_WIDTH, generator=draw)
    student_head = torch.randn(VOCABULARY, STUDENT_WIDTH, generator=draw, requires_grad=True)
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=draw)
    labels[[2, 5]] = -100
    inputs = [*student, student_head]
    loss, expected = (
        each(teacher, student, teacher_head, student_head, labels) for each in (documented, plain)
    )
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
