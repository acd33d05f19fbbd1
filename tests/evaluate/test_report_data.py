"""The part of the report about a run's training data."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_fdd.data.refusals import Reason
from megatron_fdd.data.tally import Tally
from megatron_fdd.evaluate.report import make_report
from megatron_fdd.evaluate.report.page import to_markdown
from megatron_fdd.evaluate.report.runs import Run


def write_set(prefix: Path, text: str) -> str:
    """Write `text` as a set's prepared.json, and return the prefix of the set."""
    Path(f"{prefix}.prepared.json").write_text(text)
    return str(prefix)


def test_a_preparation_is_told_set_by_set(tmp_path: Path) -> None:
    tally = Tally(documents=1200, samples=1500, tokens=90_000, learned=30_000)
    tally.lengths.update({64: 900, 128: 600})
    tally.refused.update({Reason.EMPTY: 3})
    chat = {"kwargs": {"enable_thinking": False}, "date": None, "turns": "all", "allowed": []}
    first = write_set(tmp_path / "a", json.dumps({"preparation": {**tally.as_json(), "chat": chat}}))
    second = write_set(tmp_path / "b", json.dumps({"preparation": {"documents": 7}}))
    old = write_set(tmp_path / "old", json.dumps({"kind": "text"}))
    damaged = write_set(tmp_path / "damaged", "{")
    runs = [
        Run("x", flags={"train_data_path": ["0.3", first, "0.7", second, old, damaged, "/nowhere"]}),
        Run("y", flags={"data_path": [second]}),
        Run("z"),
    ]
    facts = dict(dict(make_report(runs).facts)["Training data, as it was prepared"])
    assert facts == {
        f"{first}: documents": ["1,200", "–", "–"],
        f"{first}: samples": ["1,500", "–", "–"],
        f"{first}: tokens": ["90,000", "–", "–"],
        f"{first}: learned tokens": ["30,000", "–", "–"],
        f"{first}: samples by length, up to so many tokens": ["64: 900; 128: 600", "–", "–"],
        f"{first}: records refused": ["empty: 3", "–", "–"],
        f"{first}: chat kwargs": ["{'enable_thinking': False}", "–", "–"],
        f"{first}: chat turns": ["all", "–", "–"],
        f"{second}: documents": ["7", "7", "–"],
    }
    assert "Training data, as it was prepared" in to_markdown(make_report(runs))
