"""evaluation.json, read back: its content, checked so that the page can rely on every type in it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from megatron_fdd.evaluate.report.metrics import NUMBER
from megatron_fdd.host.field_kinds import (
    FLAG,
    OBJECT,
    TEXT,
    Kind,
    object_of,
    optional,
    shown,
    whole,
    wrong_field,
)
from megatron_fdd.host.json_file import read_json

_COUNT = whole(0, 10**15)
_FILE: Mapping[str, Kind] = {
    "sha256": optional(TEXT),
    "format": optional(TEXT),
    "min_answer_words": optional(_COUNT),
    "num_examples": optional(_COUNT),
    "rouge_l": OBJECT,
}
_ROUGE: Mapping[str, Kind] = {
    "mean": NUMBER,
    "spread": optional(NUMBER),
    "by_seed": optional(object_of(NUMBER)),
}
_TEXT_SCORE: Mapping[str, Kind] = {
    **dict.fromkeys(("file", "teacher"), optional(TEXT)),
    **dict.fromkeys(("num_tokens", "length"), optional(_COUNT)),
    **dict.fromkeys(
        ("cross_entropy", "perplexity", "kl_to_teacher", "unigram_cross_entropy"),
        optional(NUMBER),
    ),
}
_TASK: Mapping[str, Kind] = {
    "num_examples": optional(_COUNT),
    "num_shots": optional(_COUNT),
    "measures": OBJECT,
}
_MEASURE: Mapping[str, Kind] = {
    "value": NUMBER,
    "standard_error": optional(NUMBER),
    "higher_is_better": optional(FLAG),
}
_WHOLE_FILE: Mapping[str, Kind] = {
    "model": optional(TEXT),
    "settings": optional(OBJECT),
    "answers": optional(OBJECT),
    "text": optional(OBJECT),
    "samples": optional(object_of(TEXT)),
    "lm_eval": optional(OBJECT),
}


def read_evaluation(path: Path) -> dict[str, Any]:
    """Read a file that `fdd evaluate` wrote.

    Raises:
        ValueError: the file is not JSON, another kind or version of file, or a part of it has the wrong type.
    """
    found = read_json(path)
    if found.get("version") != 1:
        raise ValueError(
            f"{path} is not an evaluation of version 1: write it with this package's fdd evaluate"
        )
    _check(found, _WHOLE_FILE, path, "")
    for name, result in (found.get("answers") or {}).items():
        _check({name: result}, {name: OBJECT}, path, "answers.")
        _check(result, _FILE, path, f"answers.{name}.", needed=("rouge_l",))
        _check(result["rouge_l"], _ROUGE, path, f"answers.{name}.rouge_l.", needed=("mean",))
    _check(found.get("text") or {}, _TEXT_SCORE, path, "text.")
    harness = found.get("lm_eval") or {}
    _check(harness, {"tasks": object_of(OBJECT)}, path, "lm_eval.")
    for name, task in (harness.get("tasks") or {}).items():
        _check(task, _TASK, path, f"lm_eval.tasks.{name}.", needed=("measures",))
        for measure, value in task["measures"].items():
            place = f"lm_eval.tasks.{name}.measures."
            _check({measure: value}, {measure: OBJECT}, path, place)
            _check(value, _MEASURE, path, f"{place}{measure}.", needed=("value",))
    return found


def _check(
    values: Mapping[str, Any],
    kinds: Mapping[str, Kind],
    path: Path,
    prefix: str,
    needed: Collection[str] = (),
) -> None:
    """Refuse an object of the file with a field that is missing or has the wrong type."""
    found = wrong_field({**dict.fromkeys(needed), **values}, kinds)
    if found is not None:
        place, value, allowed = prefix + found[0], *found[1:]
        raise ValueError(
            f'{path} has "{place}": {shown(value)}, which must be {allowed}; evaluate the model again'
        )
