"""The final scores: one row for each number, one column for each run, and which run is best beyond the spread."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_fdd.evaluate.report.metrics import TOTAL, Curve, in_digits
from megatron_fdd.evaluate.report.runs import Run
from megatron_fdd.evaluate.report.terms import kinds_of
from megatron_fdd.losses.terms import VALIDATION

# The usual name of the run with which the others are compared.
TEACHER = "teacher"
# Last training values are means over 1 / _TAIL_PART of the run, but over at most so many iterations.
_TAIL_PART, _LONGEST_TAIL = 20, 100
_TEXT_SCORES = {
    "perplexity": "validation perplexity",
    "cross_entropy": "validation cross-entropy, nats",
    "kl_to_teacher": "KL(teacher || model), nats",
    "unigram_cross_entropy": "cross-entropy of a unigram model, nats",
}
# The fields that tell which examples of which file were asked.
_QUESTIONS = ("sha256", "format", "min_answer_words", "num_examples")
# Settings of an evaluation on which no answer depends.
_WITHOUT_EFFECT = ("batch_size", "device")


@dataclass(frozen=True, slots=True)
class Score:
    """One cell: a value, and how far another measurement may be off; None where that is not known."""

    value: float
    spread: float | None = None

    def __str__(self) -> str:
        spread = "" if self.spread is None else f" ± {in_digits(self.spread, 2)}"
        return in_digits(self.value) + spread


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """One number, for every run.

    Attributes:
        scores: None for a run without a score.
        conditions: what each run's value depends on beside the model; only values with equal conditions are
            compared. A run whose condition is None does not take part.
        higher_is_better: None if neither is better.
    """

    name: str
    scores: list[Score | None]
    conditions: list[Any]
    higher_is_better: bool | None = False

    @property
    def best(self) -> int | None:
        """Position of the best run, if its lead over the second exceeds the spread of both."""
        found = [
            (score, position)
            for position, score in enumerate(self.scores)
            if score is not None and self.conditions[position] is not None
        ]
        conditions = [self.conditions[position] for _, position in found]
        if self.higher_is_better is None or len(found) < 2 or any(c != conditions[0] for c in conditions):
            return None
        found.sort(key=lambda pair: pair[0].value, reverse=self.higher_is_better)
        (first, position), (second, _) = found[:2]
        if first.spread is None or second.spread is None:
            return None
        return position if abs(first.value - second.value) > max(first.spread, second.spread) else None


def evaluation_rows(runs: Sequence[Run]) -> list[ScoreRow]:
    """Return ROUGE-L of each data file, and the scores on a validation text.

    The teacher is shown but does not compete.
    """
    evaluations = [run.evaluation or {} for run in runs]
    texts = [found.get("text") or {} for found in evaluations]
    teachers = {text.get("teacher") for text in texts} - {None}
    competes = [
        run.name != TEACHER and found.get("model") not in teachers
        for run, found in zip(runs, evaluations, strict=True)
    ]

    def among_students(conditions: Iterable[Any]) -> list[Any]:
        return [
            condition if student else None for condition, student in zip(conditions, competes, strict=True)
        ]

    files = list(dict.fromkeys(name for found in evaluations for name in _answers(found)))
    rows = []
    for names in [[file] for file in files] + ([files] if len(files) > 1 else []):
        title = names[0] if len(names) == 1 else "mean of the files"
        scores = [_rouge(found, names) for found in evaluations]
        conditions = among_students(_asked(found, names) for found in evaluations)
        rows.append(ScoreRow(f"ROUGE-L, {title}", scores, conditions, higher_is_better=True))
    read = among_students((text.get("file"), text.get("num_tokens")) for text in texts)
    for key, title in _TEXT_SCORES.items():
        better = None if key == "unigram_cross_entropy" else False
        rows.append(ScoreRow(title, [_score(text.get(key)) for text in texts], read, better))
    for task, measure in dict.fromkeys(each for found in evaluations for each in _measures(found)):
        measured = [_measures(found).get((task, measure)) for found in evaluations]
        asked = among_students(_asked_of_task(found, task) for found in evaluations)
        values = [Score(each["value"], each.get("standard_error")) if each else None for each in measured]
        better = next((each.get("higher_is_better") for each in measured if each), None)
        rows.append(ScoreRow(f"{task}, {measure} (lm-eval)", values, asked, better))
    return [row for row in rows if any(row.scores)]


def _measures(evaluation: Mapping[str, Any]) -> dict[tuple[str, str], Mapping[str, Any]]:
    """Return what lm_eval measured, by task and measure."""
    tasks = (evaluation.get("lm_eval") or {}).get("tasks") or {}
    return {(task, name): value for task, found in tasks.items() for name, value in found["measures"].items()}


def _asked_of_task(evaluation: Mapping[str, Any], task: str) -> Any:
    """Return how a task was asked; None where it was not."""
    harness = evaluation.get("lm_eval") or {}
    found = (harness.get("tasks") or {}).get(task)
    return found and (harness.get("version"), found.get("num_examples"), found.get("num_shots"))


def term_rows(runs: Sequence[Run]) -> list[ScoreRow]:
    """Return the last validation value and the last training values of every loss term."""
    rows = []
    # The total is never compared: it depends on every weight.
    flags = {TOTAL: ()} | {kind.name: kind.flags for kind in kinds_of(runs)}
    for term, definition in flags.items():
        conditions = [_term_conditions(run, term, definition) for run in runs]
        better = None if term == TOTAL else False
        for key, name, score in (
            (VALIDATION + term, f"{term}, validation", _last),
            (term, f"{term}, training", _tail),
        ):
            curves = [run.metrics.curves.get(key) if run.metrics else None for run in runs]
            scores = [None if curve is None else score(curve) for curve in curves]
            rows.append(ScoreRow(name, scores, conditions, better))
    return [row for row in rows if any(row.scores)]


def _answers(evaluation: Mapping[str, Any]) -> Mapping[str, Any]:
    return evaluation.get("answers") or {}


def _asked(evaluation: Mapping[str, Any], files: Sequence[str]) -> tuple[Any, ...]:
    """Return which questions were asked, and how."""
    answers = _answers(evaluation)
    questions = [[answers.get(file, {}).get(key) for key in _QUESTIONS] for file in files]
    settings = {
        key: value for key, value in (evaluation.get("settings") or {}).items() if key not in _WITHOUT_EFFECT
    }
    return questions, settings


def _rouge(evaluation: Mapping[str, Any], files: Sequence[str]) -> Score | None:
    """Return the mean over files, and its spread over seeds; None unless every file was answered."""
    if any(file not in _answers(evaluation) for file in files):
        return None
    found = [_answers(evaluation)[file]["rouge_l"] for file in files]
    mean = statistics.fmean(each["mean"] for each in found)
    if len(files) == 1:
        return Score(mean, found[0].get("spread"))
    seeds = set.intersection(*(set(each.get("by_seed") or {}) for each in found))
    by_seed = [statistics.fmean(each["by_seed"][seed] for each in found) for seed in seeds]
    return Score(mean, statistics.stdev(by_seed) if len(by_seed) > 1 else None)


def _score(value: float | None) -> Score | None:
    return None if value is None else Score(value)


def _last(curve: Curve) -> Score:
    return Score(float(curve.values[-1]))


def _tail(curve: Curve) -> Score:
    values = curve.values[-min(_LONGEST_TAIL, max(1, len(curve) // _TAIL_PART)) :].tolist()
    return Score(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def _term_conditions(run: Run, term: str, flags: Sequence[str]) -> tuple[Any, ...] | None:
    """Return what a term's value depends on: iterations, layers, and its definition where the flags are known."""
    if run.metrics is None:
        return None
    definition = tuple(run.flags.get(flag) for flag in flags)
    return run.metrics.last, tuple(run.metrics.layer_pairs(term)), definition
