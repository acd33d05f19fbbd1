"""The report on a run of the entry point: the flags in its checkpoint, and the keys of its metrics file."""

from __future__ import annotations

from pathlib import Path

from megatron_fdd.evaluate.report.facts import flag_facts, run_facts
from megatron_fdd.evaluate.report.runs import read_runs
from megatron_fdd.evaluate.report.scores import term_rows
from tests.entry.command import trained
from tests.entry.conftest import Toys


def test_a_run_is_read_from_what_it_leaves(toy: Toys, tmp_path: Path) -> None:
    folder, metrics = tmp_path / "run", tmp_path / "run/metrics.jsonl"
    flags = ("--save", folder, "--save-interval", 2, "--train-iters", 2, "--fdd-temperature", 2)
    trained(toy.command(*flags, "--fdd-metrics-file", metrics))
    runs = read_runs([str(folder), f"metrics alone={metrics}"])
    facts = dict(flag_facts(runs))
    assert facts["--fdd-temperature"] == ["2.0", "–"]
    assert facts["--fdd-layers"] == ["2", "–"]
    assert "--fdd-lens-head" not in facts  # it has its default
    assert dict(run_facts(runs))["iterations"] == ["2", "2"]
    assert runs[0].metrics is not None
    assert runs[0].metrics.layer_pairs("delta") == ["s2:t4"]
    terms = [f"{term}, training" for term in ("total", "ce", "kd", "trajectory", "delta")]
    assert [row.name for row in term_rows(runs)] == terms

    for index in folder.glob("iter_*/.metadata"):
        index.write_bytes(b"")
    [damaged] = read_runs([str(folder)])
    assert not damaged.flags
    assert "the copy is damaged" in dict(run_facts([damaged]))["remarks"][0]
