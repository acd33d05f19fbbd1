"""The scores of the report: which run is called best, and when none is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_fdd.evaluate.report.runs import Run, read_runs
from megatron_fdd.evaluate.report.scores import Score, ScoreRow, evaluation_rows, term_rows
from tests.evaluate.report_files import evaluation, make_run, record, write


@pytest.mark.parametrize(
    ("scores", "conditions", "best"),
    [
        ([Score(20, 0.5), Score(21, 0.5)], "aa", 1),
        ([Score(20, 0.5), Score(20.5, 0.5)], "aa", None),  # the lead is as large as the spread
        ([Score(20, 0.1), Score(21, 1.5)], "aa", None),  # the lead is below the second run's spread
        ([Score(20, 0.5), Score(21)], "aa", None),  # the spread is unknown
        ([Score(20, 0.5), None, Score(18, 0.5)], "axa", 0),
        ([Score(20, 0.5), Score(21, 0.5)], "ab", None),  # the conditions differ
        (
            [Score(20, 0.5), Score(21, 0.5), Score(30, 0.1)],
            ["a", "a", None],
            1,
        ),  # the teacher does not take part
        ([Score(20, 0.5)], "a", None),
    ],
)
def test_best_is_beyond_the_spread(scores: list[Score | None], conditions: Any, best: int | None) -> None:
    assert ScoreRow("x", scores, list(conditions), higher_is_better=True).best == best


def test_lower_is_better_for_losses() -> None:
    assert ScoreRow("x", [Score(2, 0.1), Score(1, 0.1)], [0, 0]).best == 1
    assert ScoreRow("x", [Score(2, 0.1), Score(1, 0.1)], [0, 0], higher_is_better=None).best is None


def scored(*evaluations: dict[str, Any]) -> list[Run]:
    return [Run(f"run {number}", number, evaluation=each) for number, each in enumerate(evaluations)]


def test_evaluations_in_rows() -> None:
    runs = scored(evaluation(20), evaluation(23, batch_size=4), evaluation(30, model="big"))
    rows = {row.name: row for row in evaluation_rows(runs)}
    assert str(rows["ROUGE-L, dolly"].scores[0]) == "20.00 ± 0.50"
    assert rows["ROUGE-L, dolly"].best == 1
    mean = rows["ROUGE-L, mean of the files"]
    assert mean.scores[1] == Score(23, pytest.approx(0.5))  # over seeds
    assert mean.best == 1
    assert rows["validation perplexity"].scores[0] == Score(20.1)
    assert not [name for name in rows if "unigram" in name]
    other = evaluation_rows(scored(evaluation(20), evaluation(23, temperature=0.5)))
    assert {row.best for row in other} == {None}
    changed = evaluation(23)
    changed["answers"]["dolly"]["sha256"] = "another file of that name"
    rows = {row.name: row for row in evaluation_rows(scored(evaluation(20), changed))}
    assert rows["ROUGE-L, dolly"].best is None
    assert rows["ROUGE-L, mean of the files"].best is None


def test_last_values_of_the_terms(tmp_path: Path) -> None:
    long = [record(i, kd=9.0 if i <= 190 else i % 2) for i in range(1, 201)] + [
        {"iteration": 200, "valid kd": 0.7}
    ]
    write(tmp_path / "long.jsonl", long)
    runs = read_runs([str(tmp_path / "long.jsonl"), str(make_run(tmp_path / "short"))])
    rows = {row.name: row for row in term_rows(runs)}
    assert rows["kd, training"].scores == [Score(0.5, pytest.approx(0.527, abs=1e-3)), Score(3.0)]
    assert rows["kd, validation"].scores == [Score(0.7), None]
    assert "ce, training" not in rows


def test_terms_are_compared_only_where_they_mean_the_same(tmp_path: Path) -> None:
    for name, low in (("a", 0.0), ("b", 5.0)):
        write(
            tmp_path / f"{name}.jsonl", [record(i, kd=low + i % 2, total=low + i % 2) for i in range(1, 61)]
        )
    runs = read_runs([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])

    def best(second: Run) -> dict[str, int | None]:
        cold = Run("cold", metrics=runs[0].metrics, flags={"fdd_temperature": 1.0})
        return {row.name: row.best for row in term_rows([cold, second])}

    alike = Run("alike", 1, metrics=runs[1].metrics, flags={"fdd_temperature": 1.0})
    assert best(alike)["kd, training"] == 0
    assert best(alike)["total, training"] is None  # depends on the weights
    assert best(replace(alike, flags={"fdd_temperature": 2.0}))["kd, training"] is None
    assert alike.metrics is not None
    assert (
        best(replace(alike, metrics=replace(alike.metrics, last=61)))["kd, training"] is None
    )  # this run was trained longer
