"""The study: its statistics, the source of docs/study.md, and the whole script at toy size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.convert.toys import make_llama
from tests.harness import forked_python

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples/study"))

import score  # noqa: E402
import split  # noqa: E402
import table  # noqa: E402


def run_of(method: str, seed: int, kl: float, rate: str = "1e-2") -> dict[str, Any]:
    scores = {"cross_entropy": kl + 1, "kl_to_teacher": kl}
    return {
        "student": "thin",
        "method": method,
        "rate": rate,
        "seed": seed,
        "test": scores,
        "validation": scores,
    }


def results_of(*runs: dict[str, Any]) -> table.Results:
    return table.Results({"scan_seed": 100}, {}, list(runs))


def test_differences_are_paired_by_seed() -> None:
    base = [run_of("kd", seed, kl) for seed, kl in ((1, 1.0), (2, 2.0), (3, 3.0), (100, 9.0))]
    better = [run_of("fdd", seed, kl) for seed, kl in ((3, 2.8), (1, 0.9), (2, 1.9), (4, 7.0), (100, 1.0))]
    # Runs at a rate that was worse in the scan are no part of the comparison.
    other_rate = [run_of("fdd", 1, 50.0, "3e-3"), run_of("fdd", 100, 1.1, "3e-3")]
    found = results_of(*base, *better, *other_rate).difference("thin", ("fdd", "kd"), "kl_to_teacher")
    assert found is not None
    # Differences are -0.1, -0.1 and -0.2: mean -0.1333, deviation 0.05774; t with 2 degrees of freedom is 4.303.
    assert found.mean == pytest.approx(-0.13333, abs=1e-4)
    assert found.half_width == pytest.approx(4.303 * 0.057735 / 3**0.5, abs=1e-4)
    assert not found.counts
    assert str(found) == "none (−0.1333 ± 0.1434)"
    assert str(table.Difference(-0.2, 0.1)) == "**−0.2000 ± 0.1000**"
    assert results_of(*base).difference("thin", ("fdd", "kd"), "kl_to_teacher") is None


def test_a_method_takes_the_rate_that_did_best_in_its_scan() -> None:
    scan = [run_of("fdd", 100, 2.0, "1e-2"), run_of("fdd", 100, 1.0, "3e-3"), run_of("kd", 100, 0.1, "1e-1")]
    results = results_of(*scan, run_of("fdd", 1, 0.0, "1e-3"))
    assert results.best_rate("thin", "fdd") == "3e-3"
    assert results.best_rate("thin", "kd") == "1e-1"
    with pytest.raises(ValueError, match="thin ce"):
        results.best_rate("thin", "ce")


@pytest.mark.parametrize("method", table.METHODS)
def test_a_folders_name_says_what_was_trained(method: str) -> None:
    found = score.describe(Path(f"runs/thin-{method}-1e-2-100"))
    assert found == {"student": "thin", "method": method, "rate": "1e-2", "seed": 100}


def test_stories_are_parted_once(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(
        "<|endoftext|>\n" + "".join(f"story {n % 40}\n<|endoftext|>\n" for n in range(41)) + "cut o"
    )
    stories = split.read_stories(text, "<|endoftext|>")
    assert stories == [f"story {number}" for number in range(40)]
    parts = split.split_stories(stories, 20)
    assert parts["validation"] == ["story 0", "story 20"]
    assert parts["test"] == ["story 1", "story 21"]
    assert sorted(sum(parts.values(), [])) == sorted(stories)
    with pytest.raises(ValueError, match="separator"):
        split.read_stories(text, "---")


def test_inner_terms(tmp_path: Path) -> None:
    """Terms are 0 between a model and itself, above 0 if the blocks differ; the delta starts at the second pair."""
    import torch

    model = score.load(make_llama(tmp_path / "model", num_hidden_layers=3))
    windows = torch.randint(0, model.config.vocab_size, (40, 9))
    same = score.inner_terms(model, model, ((1, 1), (2, 2)), windows)
    assert set(same) == {"trajectory s1:t1", "trajectory s2:t2", "delta s2:t2"}
    assert all(abs(value) < 1e-5 for value in same.values())
    other = score.inner_terms(model, model, ((1, 2), (2, 1)), windows)
    assert all(value > 0.1 for value in other.values())
    # The last window counts like the first, and no window counts twice.
    halves = [score.inner_terms(model, model, ((1, 2),), part) for part in (windows[:8], windows[8:])]
    both = (8 * halves[0]["trajectory s1:t2"] + 32 * halves[1]["trajectory s1:t2"]) / 40
    assert other["trajectory s1:t2"] == pytest.approx(both, rel=1e-4)


def test_the_document_holds_what_the_committed_results_give() -> None:
    results = table.Results(**json.loads((ROOT / "examples/study/results.json").read_text()))
    document = (ROOT / "docs/study.md").read_text()
    assert table.rewrite(document, table.tables(results)) == document, "run: python examples/study/table.py"
    assert (ROOT / "docs/study.png").read_bytes().startswith(b"\x89PNG")


def study(folder: Path, **knobs: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "SETUP": "0",
        **forked_python.environment(),
        "WORK": str(folder / "work"),
        "APPEND_EOD": "1",
        "TRAIN_ITERS": "2",
        "WARMUP_ITERS": "1",
        "SEQ_LENGTH": "16",
        "THIN_RATES": "1e-3",
        "SHALLOW_RATES": "1e-3",
        **knobs,
    }
    command = ["bash", str(ROOT / "examples/study/run.sh"), str(folder / "teacher"), str(folder / "text.txt")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def metrics(folder: Path, run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"work/runs/{run}/metrics.jsonl").open()]


def test_study_at_toy_size(tmp_path: Path) -> None:
    # The thin student has as many words as the tokenizer, but must have the teacher's number.
    make_llama(tmp_path / "teacher", num_hidden_layers=5, vocab_size=91)
    stories = [f"the quick brown fox {number} jumps over the lazy dog" for number in range(80)]
    (tmp_path / "text.txt").write_text("".join(f"{story}\n<|endoftext|>\n" for story in [*stories, "cut"]))
    done = study(tmp_path, STUDENTS="thin", METHODS="kd-delta fdd", SEEDS="1 2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "### Thin student, from scratch" in done.stdout
    first = {
        run: metrics(tmp_path, f"thin-{run}")[0] for run in ("kd-delta-1e-3-1", "fdd-1e-3-1", "fdd-1e-3-2")
    }
    # Runs of one seed have the same start and text, whatever the method; another seed has another start.
    assert first["kd-delta-1e-3-1"]["kd"] == first["fdd-1e-3-1"]["kd"] != first["fdd-1e-3-2"]["kd"]
    assert first["kd-delta-1e-3-1"]["trajectory"] is None is not first["fdd-1e-3-1"]["trajectory"]

    more = study(tmp_path, STUDENTS="thin shallow", METHODS="fdd", SEEDS="1")
    assert more.returncode == 0, more.stdout + more.stderr
    assert more.stdout.count("done before") == 2
    results = json.loads((tmp_path / "work/results.json").read_text())
    cells = [(run["student"], run["method"], run["seed"]) for run in results["runs"]]
    assert sorted(cells) == sorted(
        [("thin", method, seed) for method in ("kd-delta", "fdd") for seed in (1, 2)]
        + [("thin", "fdd", 100), ("thin", "kd-delta", 100), ("shallow", "fdd", 100), ("shallow", "fdd", 1)]
    )

    stored = study(tmp_path, STUDENTS="thin", METHODS="fdd-store-float32", SEEDS="1")
    assert stored.returncode == 0, stored.stdout + stored.stderr
    runs = [metrics(tmp_path, f"thin-{method}-1e-3-1") for method in ("fdd-store-float32", "fdd")]
    assert [step["total"] for step in runs[0]] == [step["total"] for step in runs[1]]
    assert not (tmp_path / "work/runs/thin-fdd-store-float32-1e-3-1/store").exists()

    refused = study(tmp_path, TRAIN_ITERS="3")
    assert refused.returncode == 1
    assert "settings.json" in refused.stderr
