"""Tasks of lm-evaluation-harness: what is taken from its results, where they are shown, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from unittest import mock

import pytest

from megatron_fdd.evaluate import harness
from megatron_fdd.evaluate.harness import HarnessTasks, results_of
from megatron_fdd.evaluate.models import NamedModel, Placement
from megatron_fdd.evaluate.report.evaluation_file import read_evaluation
from megatron_fdd.evaluate.report.runs import Run
from megatron_fdd.evaluate.report.scores import evaluation_rows
from megatron_fdd.evaluate.results import Evaluation
from megatron_fdd.evaluate.table import table
from tests.convert.toys import make_llama, write_json

# As lm_eval 0.4.13 returns it.
FOUND = {
    "results": {
        "words": {
            "name": "words",
            "alias": "words",
            "sample_len": 12,
            "acc,none": 0.25,
            "acc_stderr,none": 0.125,
            "exact_match,strict": 0.5,
            "exact_match_stderr,strict": "N/A",
            "brier,none": float("nan"),
        }
    },
    "higher_is_better": {"words": {"acc": True, "exact_match": True}},
    "n-samples": {"words": {"original": 20, "effective": 12}},
    "n-shot": {"words": 2},
    "lm_eval_version": "0.4.13",
}


def test_measures_of_each_task() -> None:
    kept = results_of(FOUND)
    acc = {"value": 0.25, "standard_error": 0.125, "higher_is_better": True}
    exact = {"value": 0.5, "standard_error": None, "higher_is_better": True}
    measures = {"acc": acc, "exact_match,strict": exact}
    words = {"num_examples": 12, "num_shots": 2, "measures": measures}
    assert kept == {"version": "0.4.13", "tasks": {"words": words}}


def _runs(tmp_path: Path, **values: float) -> list[Run]:
    runs: list[Run] = []
    for name, value in values.items():
        kept = results_of(FOUND)
        kept["tasks"]["words"]["measures"]["acc"]["value"] = value
        path = tmp_path / f"{name}.json"
        write_json(path, {"version": 1, "model": name, "lm_eval": kept})
        runs.append(Run(name, len(runs), evaluation=read_evaluation(path)))
    return runs


def test_scores_on_the_page(tmp_path: Path) -> None:
    rows = evaluation_rows([*_runs(tmp_path, one=0.25, two=0.75), Run("three", 2)])
    assert [row.name for row in rows] == ["words, acc (lm-eval)", "words, exact_match,strict (lm-eval)"]
    assert [str(score) for score in rows[0].scores] == ["0.2500 ± 0.12", "0.7500 ± 0.12", "None"]
    assert rows[0].best == 1
    assert rows[1].best is None  # its error is not known
    assert evaluation_rows(_runs(tmp_path, one=0.25, two=0.3))[0].best is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"tasks": []},
        {"tasks": {"words": {}}},
        {"tasks": {"words": {"measures": {"acc": 1}}}},
        {"tasks": {"words": {"measures": {"acc": {"value": "high"}}}}},
    ],
)
def test_a_malformed_file(tmp_path: Path, wrong: object) -> None:
    write_json(tmp_path / "evaluation.json", {"version": 1, "lm_eval": wrong})
    with pytest.raises(ValueError, match="lm_eval.* which must be .*evaluate the model again"):
        read_evaluation(tmp_path / "evaluation.json")


def test_table(tmp_path: Path) -> None:
    evaluation = Evaluation(NamedModel("mine", tmp_path), tasks=results_of(FOUND))
    assert table([evaluation]).splitlines() == [
        "words, acc (12 examples)",
        "mine           0.2500 ± 0.1250",
        "words, exact_match,strict (12 examples)",
        "mine           0.5000",
    ]


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"--lm-eval-tasks {tmp_path}: give --lm-eval with"):
        HarnessTasks((), tmp_path).check()
    missing = mock.patch.object(importlib.util, "find_spec", return_value=None)
    with (
        missing,
        pytest.raises(ValueError, match="--lm-eval words: needs lm-evaluation-harness: pip install"),
    ):
        HarnessTasks(("words",)).check()
    known = mock.Mock(match_tasks=lambda names: [name for name in names if name == "words"])
    there = mock.patch.object(importlib.util, "find_spec")
    index = mock.patch.object(harness, "_manager", return_value=known)
    with there, index:
        HarnessTasks(("words",)).check()
        with pytest.raises(
            ValueError, match="--lm-eval wrods: lm_eval has no task of this name; give another"
        ):
            HarnessTasks(("words", "wrods")).check()


TASK = """
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.tier("all")
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
def test_a_task_on_this_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = NamedModel("mine", make_llama(tmp_path / "model"))
    tasks = HarnessTasks(("words",), tmp_path / "tasks")
    (tmp_path / "tasks").mkdir()
    file = tmp_path / "words.jsonl"
    (tmp_path / "tasks/words.yaml").write_text(TASK.format(file=file))
    loaded = Placement("cpu", "float32").load(model.folder), model.tokenizer(), 4
    tasks.check()
    with pytest.raises(
        ValueError, match="--lm-eval words: lm_eval ended with FileNotFoundError: .*words.jsonl"
    ):
        tasks.run(*loaded)
    question = {"question": "the lazy", "choices": [" fox", " dog"]}
    file.write_text("".join(json.dumps({**question, "answer": number}) + "\n" for number in (0, 1)))
    found = tasks.run(*loaded)["tasks"]["words"]
    assert found["num_examples"] == 2
    assert found["measures"]["acc"]["value"] == 0.5  # one of the two is right, whatever the weights say
