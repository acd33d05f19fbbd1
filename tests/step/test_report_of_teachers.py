"""The log of several teachers: means of all tokens, and of each teacher's own; nothing for one that was not there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_fdd.config import FddConfig
from megatron_fdd.losses.layer_plan import ChunkPlan
from megatron_fdd.losses.objective import Objective
from megatron_fdd.losses.pairs import LayerPair
from megatron_fdd.ops.head_grams import StepGrams
from megatron_fdd.ops.linear_kl import VocabShard
from megatron_fdd.step.metrics import Report

CONFIG = FddConfig(teacher_load="T", beta=0, kd_weight=2.0)
# Sums of two teachers: labels, tokens, ce, kd, and the trajectory at both pairs.
SUMS = torch.tensor([3.0, 3, 6, 9, 3, 6, 1, 1, 4, 5, 7, 7])


def objective(*teacher_blocks: int) -> Objective:
    pairs = [LayerPair(block + 1, teacher) for block, teacher in enumerate(teacher_blocks)]
    chunk = ChunkPlan((0, 1), None, None, True, True)
    return Objective(CONFIG, pairs, chunk, VocabShard(0, 5, None), StepGrams(), None)


def means(report: Report, sums: torch.Tensor) -> dict[str, float]:
    return {name: mean.item() for name, mean in report.means(sums).items()}


def test_means_are_of_all_tokens_and_of_each_teachers_own() -> None:
    report = Report([objective(2, 4), objective(2, 4)], ["code", "maths"])
    found = means(report, SUMS)
    assert report.num_sums == len(SUMS)
    assert (found["kd"], found["kd code"], found["kd maths"]) == (14 / 4, 3, 5)
    assert (found["trajectory s1:t2"], found["trajectory s1:t2 code"]) == (10 / 4, 1)
    assert (found["total code"], found["total maths"]) == (2 * 3 + (1 + 2) / 2, 2 * 5 + 7)
    assert found["total"] == pytest.approx((3 * found["total code"] + found["total maths"]) / 4)
    assert report.label_tokens(SUMS) == 4
    record = report.record(SUMS, report.means(SUMS))
    assert (record["tokens"], record["tokens code"], record["tokens maths"]) == (4, 3, 1)
    assert not [name for name in found if name.startswith("share") and name.endswith("code")]


def test_layers_of_different_teachers_have_no_common_mean() -> None:
    found = means(Report([objective(2, 4), objective(3, 6)], ["code", "maths"]), SUMS)
    layers = {name for name in found if name.startswith("trajectory s")}
    assert layers == {
        f"trajectory {pair}" for pair in ("s1:t2 code", "s2:t4 code", "s1:t3 maths", "s2:t6 maths")
    }
    assert found["trajectory"] == pytest.approx((10 / 4 + 13 / 4) / 2)


def test_a_teacher_that_was_in_no_batch_has_no_values() -> None:
    report = Report([objective(2, 4), objective(3, 6)], ["code", "maths"])
    sums = torch.cat([SUMS[:6], torch.zeros(6)])
    left = report.seen(sums, report.means(sums))
    assert "kd code" in left
    assert "kd" in left
    assert not [name for name in left if name.endswith(" maths")]
    record = report.record(sums, report.means(sums))
    assert (record["tokens"], record["tokens code"], record["tokens maths"]) == (3, 3, 0)
    assert (record["kd"], record["kd code"], record["kd maths"]) == (3, 3, None)
    assert record["trajectory s1:t3 maths"] is None


def test_one_teacher_has_the_names_it_always_had() -> None:
    report: Any = Report([objective(2, 4)], [""])
    found = means(report, SUMS[:6])
    assert not [name for name in found if name != name.rstrip()]
    assert found["kd"] == 3
    record = report.record(SUMS[:6], report.means(SUMS[:6]))
    assert [name for name in record if name.startswith("tokens")] == ["tokens"]


def test_a_mean_over_no_token_is_no_number() -> None:
    """A step without a label, and a step without any token."""
    report = Report([objective(2, 4)], [""])
    for labels, tokens, absent in (
        (0, 3, {"ce"}),
        (0, 0, {"total", "ce", "kd", "trajectory"}),
        (3, 3, set()),
    ):
        sums = torch.tensor([labels, tokens, *[value * (tokens > 0) for value in (0.0, 9, 3, 6)]])
        record = report.record(sums, report.means(sums))
        shown = ("total", "ce", "kd", "trajectory")
        assert {name for name in shown if record[name] is None} == absent
        assert set(report.seen(sums, report.means(sums))) == {
            name for name in report.means(sums) if record[name] is not None
        }
