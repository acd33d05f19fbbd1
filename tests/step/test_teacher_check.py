"""The teacher's cross-entropy on the first batch, in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_fdd.losses.features import TeacherFeatures
from megatron_fdd.ops.linear_kl import Heads, Implementation, VocabShard
from megatron_fdd.step.lessons import Lesson
from megatron_fdd.step.teacher.check import FirstBatchCheck, log_cross_entropy


@pytest.mark.parametrize(
    ("labels", "line"),
    [
        ((-100, 1, 2), "teacher cross-entropy on the first batch: 0.7203 nats per token (uniform: 1.6094)"),
        ((-100, -100, -100), "teacher cross-entropy on the first batch: no label in it, nothing to score"),
    ],
)
def test_it_says_when_nothing_is_scored(
    labels: tuple[int, ...], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, group: None)
    head = torch.tensor([0, 1, 1, 0, 0])[:, None].expand(5, 4).float()  # likes words 1 and 2
    heads = Heads(None, head, VocabShard(0, 5, None), Implementation("torch"))
    group: Any = None
    features = TeacherFeatures(torch.ones(3, 1, 4), {})
    log_cross_entropy(features, torch.tensor(labels), heads=heads, group=group, say=said.append)
    assert said == [line]


def test_each_teacher_is_checked_on_its_own_first_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher that no rank has in its batch waits for a later one; nothing is said twice."""
    said: list[str] = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, group: None)
    head = torch.tensor([0, 1, 1, 0, 0])[:, None].expand(5, 4).float()
    heads = Heads(None, head, VocabShard(0, 5, None), Implementation("torch"))
    anyone: Any = None
    check = FirstBatchCheck(["code", "maths"], [heads, heads], group=anyone, say=said.append)

    def lesson(number: int) -> Lesson:
        return Lesson(
            number, anyone, TeacherFeatures(torch.ones(3, 1, 4), {}), anyone, torch.tensor([-100, 1, 2])
        )

    assert not check([lesson(1)])
    assert not check([lesson(1)])
    assert check([lesson(0), lesson(1)])
    told = "cross-entropy on the first batch: 0.7203 nats per token (uniform: 1.6094)"
    assert said == [f"teacher maths {told}", f"teacher code {told}"]


@pytest.mark.parametrize(("scale", "is_warned"), [(0.0, True), (0.1, False), (-1.0, True)])
def test_states_that_know_nothing_are_warned_of(
    scale: float, is_warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zeros are as good as a uniform guess, and no better; the negative of a good state is worse."""
    said: list[str] = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, group: None)
    head = torch.tensor([0, 1, 1, 0, 0])[:, None].expand(5, 4).float()
    heads = Heads(None, head, VocabShard(0, 5, None), Implementation("torch"))
    group: Any = None
    features = TeacherFeatures(torch.full((3, 1, 4), scale), {})
    log_cross_entropy(features, torch.tensor([1, 1, 2]), heads=heads, group=group, say=said.append)
    assert any("NO BETTER THAN A UNIFORM GUESS" in line for line in said) == is_warned
