"""The training data of a run: what `fdd prepare` recorded when it made the sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_fdd.evaluate.report.facts import UNKNOWN, Facts
from megatron_fdd.evaluate.report.runs import Run
from megatron_fdd.host.field_kinds import OBJECT, Kind, object_of, optional, whole, wrong_field
from megatron_fdd.host.json_file import read_json

_INFO = ".prepared.json"  # also in `data.prepared`, which imports Megatron
_COUNTS = {
    "documents": "documents",
    "samples": "samples",
    "tokens": "tokens",
    "learned": "learned tokens",
    "truncated": "samples cut to the sequence length",
}
_COUNT = whole(0, 10**15)
_KINDS: Mapping[str, Kind] = {
    **dict.fromkeys(_COUNTS, optional(_COUNT)),
    **dict.fromkeys(("lengths", "refused", "notes"), optional(object_of(_COUNT))),
    "chat": optional(OBJECT),
}


def data_facts(runs: Sequence[Run]) -> Facts:
    """Return a row for each set and number; sets that are gone, or that an older version made, are left out."""
    seen = [_preparations(run) for run in runs]
    names = list(dict.fromkeys(name for found in seen for name in found))
    facts: Facts = []
    for name in names:
        told = [_facts_of(found[name]) if name in found else {} for found in seen]
        for key in dict.fromkeys(key for each in told for key in each):
            facts.append((f"{name}: {key}", [each.get(key, UNKNOWN) for each in told]))
    return facts


def _preparations(run: Run) -> dict[str, Mapping[str, Any]]:
    """Return the preparation of each set, by the set's prefix."""
    flags = [run.flags.get(name) or () for name in ("train_data_path", "data_path")]
    flags = [[flag] if isinstance(flag, str) else flag for flag in flags]
    found: dict[str, Mapping[str, Any]] = {}
    for prefix in (str(word) for flag in flags for word in flag):  # the weights of a blend are among them
        path = Path(prefix + _INFO)
        try:
            if not path.is_file():
                continue
            preparation = read_json(path).get("preparation")
        except ValueError:
            continue  # training refuses such a file; a report continues without it
        if isinstance(preparation, dict) and wrong_field(preparation, _KINDS) is None:
            found[prefix] = preparation
    return found


def _facts_of(preparation: Mapping[str, Any]) -> dict[str, str]:
    told = {text: f"{preparation.get(key, 0):,}" for key, text in _COUNTS.items() if preparation.get(key)}
    if preparation.get("lengths"):
        told["samples by length, up to so many tokens"] = _counts(preparation["lengths"])
    if preparation.get("refused"):
        told["records refused"] = _counts(preparation["refused"])
    if preparation.get("notes"):
        told["noticed"] = _counts(preparation["notes"])
    for key, value in (preparation.get("chat") or {}).items():
        if value:
            told[f"chat {key.replace('_', ' ')}"] = str(value)
    return told


def _counts(counts: Mapping[str, int]) -> str:
    return "; ".join(f"{name}: {count:,}" for name, count in counts.items())
