"""Metrics files and evaluations for the tests of the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PAIRS = ("s2:t4", "s4:t8")


def record(iteration: int, **changes: Any) -> dict[str, Any]:
    """Return one line of a run that distils two layers; its values tell which iteration it is."""
    return {
        "iteration": iteration,
        "tokens": 100,
        "total": 4.0 + iteration,
        "ce": None,
        "kd": 1.0 * iteration,
        "trajectory": 2.0,
        "delta": 0.5,
        "trajectory s4:t8": 3.0,
        "trajectory s2:t4": 1.0 * iteration,
        "delta s4:t8": 0.5,
        "share kd": 0.25,
        "share trajectory": 0.5,
        "share delta": 0.25,
        "grad_norm": 2.0,
        "seconds": 0.5,
        **changes,
    }


def write(path: Path, records: list[Any], tail: str = "") -> Path:
    """Write records as JSON lines, and `tail` after them; return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(each) + "\n" for each in records) + tail)
    return path


def make_run(folder: Path, length: int = 3, **changes: Any) -> Path:
    """Write the metrics file of a run with `length` records, and return its folder."""
    write(folder / "metrics.jsonl", [record(i, **changes) for i in range(1, length + 1)])
    return folder


def evaluation(
    mean: float = 20.0, spread: float | None = 0.5, *, model: str = "m", **settings: Any
) -> dict[str, Any]:
    """Return the content of an evaluation.json."""
    by_seed = {str(seed): mean + step for seed, step in ((10, -0.5), (20, 0.0), (30, 0.5))}
    answers = {"num_examples": 7, "rouge_l": {"by_seed": by_seed, "mean": mean, "spread": spread}}
    text = {
        "file": "v.jsonl",
        "num_tokens": 64,
        "cross_entropy": 3.0,
        "perplexity": 20.1,
        "kl_to_teacher": 0.3,
    }
    return {
        "version": 1,
        "model": model,
        "settings": {"seeds": [10, 20, 30], **settings},
        "answers": {"dolly": answers, "vicuna": answers},
        "mean_rouge_l": mean,
        "text": {**text, "teacher": "big", "unigram_cross_entropy": None},
        "samples": {"Once": " upon <b>a | time"},
    }


def write_evaluation(folder: Path, **content: Any) -> Path:
    """Write an evaluation.json into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(evaluation(**content)))
    return folder
