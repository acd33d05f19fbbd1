"""Whole evaluations of tiny random models: scores, files, interruptions."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rouge_score.rouge_scorer import RougeScorer
from safetensors.torch import load_file, save_file

from megatron_fdd.evaluate.data_file import Selection, read_data_file
from megatron_fdd.evaluate.evaluation import evaluate
from megatron_fdd.evaluate.generation import Generator, Prompt
from megatron_fdd.evaluate.models import NamedModel, Placement
from megatron_fdd.evaluate.request import Request
from megatron_fdd.evaluate.rouge import rouge_l
from megatron_fdd.evaluate.settings import GenerationSettings, Text
from megatron_fdd.evaluate.table import table
from tests.convert.toys import make_llama, make_tokenizer
from tests.harness import forked_python

TOOL = Path(__file__).parents[2] / "tools" / "evaluate.py"
WORDS = "the quick brown fox jumps over the lazy dog a student follows its teacher".split()
SETTINGS = GenerationSettings(seeds=(10, 20), max_prompt_tokens=20, max_new_tokens=6)
NUM_EXAMPLES = 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a teacher, a student and data: texts of different lengths, two references each."""
    folder = tmp_path_factory.mktemp("evaluation")
    make_llama(folder / "teacher")
    make_llama(folder / "student", num_hidden_layers=2)
    rows: list[dict[str, Any]] = [
        {"prompt": " ".join(WORDS[: number % 5 + 1]), "output": [WORDS[number], " ".join(WORDS)]}
        for number in range(NUM_EXAMPLES)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "short").write_text('{"text": "a"}')
    (folder / "larger").mkdir()
    (folder / "unknown").mkdir()
    config = json.loads((folder / "student/config.json").read_text())
    (folder / "larger/config.json").write_text(json.dumps(config | {"vocab_size": 107}))
    (folder / "unknown/config.json").write_text(json.dumps(config | {"model_type": "unheard of"}))
    (folder / "renamed").mkdir()
    (folder / "renamed/config.json").write_text(json.dumps(config))
    shutil.copy(folder / "student/tokenizer_config.json", folder / "renamed")
    tokenizer = json.loads((folder / "student/tokenizer.json").read_text(encoding="utf-8"))
    words = tokenizer["model"]["vocab"]
    words["\u2581lazy"], words["\u2581over"] = words["\u2581over"], words["\u2581lazy"]
    (folder / "renamed/tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "chat").mkdir()
    make_tokenizer(folder / "chat", added=("<|chat|>", "<|new|>"))
    (folder / "chat/config.json").write_text(json.dumps(config))
    (folder / "new.jsonl").write_text(json.dumps({"text": " ".join(["<|new|>", *WORDS * 12])}) + "\n")
    (folder / "text.jsonl").write_text(json.dumps({"text": " ".join(WORDS * 12)}) + "\n")
    return folder


def request(folder: Path, out: Path, **changes: Any) -> Request:
    """Return a request for the models and the data in `folder`."""
    selection = changes.pop("selection", Selection())
    default = Request(
        models=(NamedModel("student", folder / "student"),),
        has_teacher=False,
        data=(read_data_file("data", folder / "data.jsonl", selection),),
        text=Text(),
        generation=SETTINGS,
        placement=Placement("cpu", "float32"),
        batch_size=2,
        out=out,
    )
    return dataclasses.replace(default, **changes)


def contents(out: Path) -> dict[str, bytes]:
    """Return the files below a folder, by name."""
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_scores_are_those_of_direct_calls(folder: Path, tmp_path: Path) -> None:
    found = evaluate(request(folder, tmp_path))[0]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    rows = [json.loads(line) for line in (folder / "data.jsonl").open()]
    means = {}
    for seed in SETTINGS.seeds:
        lines = (tmp_path / f"student/answers/data.seed{seed}.jsonl").read_text().splitlines()[1:]
        answers = [json.loads(line) for line in lines]
        assert [answer["number"] for answer in answers] == list(range(NUM_EXAMPLES))
        best = [
            max(scorer.score(reference, answer["answer"])["rougeL"].fmeasure for reference in row["output"])
            for row, answer in zip(rows, answers, strict=True)
        ]
        means[str(seed)] = 100 * sum(best) / len(best)
    written = json.loads((tmp_path / "student/evaluation.json").read_text())
    result = written["answers"]["data"]
    assert result["rouge_l"]["by_seed"] == pytest.approx(means)
    assert len(set(means.values())) == 2
    assert min(means.values()) > 0
    assert result["rouge_l"]["mean"] == pytest.approx(statistics.mean(means.values())) == found.mean_rouge_l
    assert result["rouge_l"]["spread"] == pytest.approx(statistics.stdev(means.values()))
    assert (result["format"], result["num_examples"], result["num_cut_prompts"]) == ("prompt", 9, 0)
    assert (written["text"], written["samples"], written["settings"]["seeds"]) == (None, {}, [10, 20])


def test_rouge_is_stemmed_and_of_the_best_reference() -> None:
    assert rouge_l(
        ["something else", "The students followed teachers."], "a student follows"
    ) == pytest.approx(100 * 2 * 2 / (4 + 3))


def test_teacher_text_and_table(folder: Path, tmp_path: Path) -> None:
    models = (NamedModel("student", folder / "student"), NamedModel("teacher", folder / "teacher"))
    text = Text(
        folder / "text.jsonl", folder / "text.jsonl", 8, 64, prompts=("a student",), num_sample_tokens=3
    )
    greedy = dataclasses.replace(SETTINGS, temperature=0)
    results = evaluate(
        request(folder, tmp_path, models=models, has_teacher=True, text=text, generation=greedy)
    )
    written = {
        name: json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("student", "teacher")
    }
    student = written["student"]["text"]
    assert student["kl_to_teacher"] > 0.1
    assert written["teacher"]["text"]["kl_to_teacher"] == 0
    assert student["perplexity"] == pytest.approx(math.exp(student["cross_entropy"]))
    assert (student["num_tokens"], student["length"]) == (64, 8)
    assert student["teacher"] == str(folder / "teacher")
    assert student["unigram_cross_entropy"] < math.log(99)
    assert written["student"]["answers"]["data"]["rouge_l"]["spread"] is None
    assert list(written["student"]["answers"]["data"]["rouge_l"]["by_seed"]) == ["10"]
    assert len(written["student"]["samples"]["a student"].split()) <= 4
    lines = table(results).splitlines()
    assert lines[0].split() == ["ROUGE-L", "data", "mean", "(1", "seed)"]
    assert [line.split()[0] for line in lines[1:4]] == ["student", "teacher", "examples"]
    assert "perplexity  cross-entropy  KL(teacher || model)   (64 tokens)" in lines[5]
    assert lines[8].startswith("unigram model")


def interrupted(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch, num_batches: int) -> None:
    """Start an evaluation, and stop it when it has answered so many batches."""
    answer = Generator.answer
    left = iter(range(num_batches))

    def stop(self: Generator, batch: list[Prompt], seed: int) -> list[str]:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return answer(self, batch, seed)

    with monkeypatch.context() as context:
        context.setattr(Generator, "answer", stop)
        with pytest.raises(KeyboardInterrupt):
            evaluate(request(folder, out))


def test_a_full_disk_names_the_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ValueError, match=rf"^--out {tmp_path}/out: cannot be written: .*; make room there"):
        evaluate(request(folder, tmp_path / "out"))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=rf"^--out {tmp_path}/file: .* is a file"):
        evaluate(request(folder, tmp_path / "file"))


def test_an_interrupted_run_ends_like_one_that_was_not(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(request(folder, tmp_path / "whole"))
    expected = contents(tmp_path / "whole")
    out = tmp_path / "out"
    interrupted(folder, out, monkeypatch, 2)
    file = out / "student/answers/data.seed10.jsonl"
    assert len(file.read_bytes().splitlines()) == 1 + 2 * 2
    with file.open("a") as torn:
        torn.write('{"number": 3, "ans')
    interrupted(folder, out, monkeypatch, 1)
    assert len(file.read_bytes().splitlines()) == 1 + 3 * 2
    interrupted(folder, out, monkeypatch, 3)
    assert not (out / "student/evaluation.json").exists()
    evaluate(request(folder, out))
    assert contents(out) == expected

    # A finished file needs no model any more.
    monkeypatch.setattr(Placement, "load", lambda *_: pytest.fail("a model was loaded"))
    evaluate(request(folder, out))
    assert contents(out) == expected


def test_a_run_may_go_on_with_more_examples_and_other_batches(folder: Path, tmp_path: Path) -> None:
    evaluate(request(folder, tmp_path / "whole"))
    expected = contents(tmp_path / "whole")
    first = request(folder, tmp_path / "out", selection=Selection(limit=4), batch_size=3)
    assert evaluate(first)[0].answers["data"].scores.by_seed[10] > 0
    assert (
        json.loads((tmp_path / "out/student/evaluation.json").read_text())["answers"]["data"]["num_examples"]
        == 4
    )
    evaluate(request(folder, tmp_path / "out"))
    assert contents(tmp_path / "out") == expected


def test_answers_of_other_settings_are_refused(folder: Path, tmp_path: Path) -> None:
    evaluate(request(folder, tmp_path / "out"))
    hotter = dataclasses.replace(SETTINGS, temperature=2.0)
    with pytest.raises(
        ValueError, match=r"seed10.jsonl holds .* \(temperature 1.0 -> 2.0\): give another --out"
    ):
        evaluate(request(folder, tmp_path / "out", generation=hotter))
    retrained = (NamedModel("student", folder / "teacher"),)
    with pytest.raises(ValueError, match=r"other settings \(model .* -> "):
        evaluate(request(folder, tmp_path / "out", models=retrained))
    (tmp_path / "out/student/answers/data.seed10.jsonl").write_text("no answers\n")
    with pytest.raises(ValueError, match="does not hold answers"):
        evaluate(request(folder, tmp_path / "out"))


def test_refused_before_a_model_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Placement, "load", lambda *_: pytest.fail("a model was loaded"))
    one, nowhere = NamedModel("student", folder / "student"), NamedModel("x", folder / "nowhere")
    for changes, message in (
        ({"data": ()}, "nothing to evaluate"),
        ({"models": (one, one)}, "two models are called 'student'"),
        ({"models": (nowhere,)}, "nowhere is not a Hugging Face model folder"),
        ({"models": (NamedModel("a/b", folder / "student"),)}, "'a/b' cannot be the name of a folder"),
        ({"batch_size": 0}, "--batch-size 0: at least 1"),
        ({"text": Text(folder / "nowhere.jsonl")}, "nowhere.jsonl does not exist"),
        ({"text": Text(length=0)}, "--length 0: at least 1"),
        ({"text": Text(folder / "text.jsonl", max_tokens=127)}, "--max-tokens 127: less than one window of"),
        ({"text": Text(training=folder / "text.jsonl")}, "--training-text is for the unigram model"),
        ({"text": Text(folder / "data.jsonl", length=8)}, r"data.jsonl, line 1: the field 'text' is missing"),
        (
            {"text": Text(folder / "text.jsonl", length=60000, max_tokens=60000)},
            "--length 60000: a model has 64 positions",
        ),
        ({"text": Text(folder / "text.jsonl", length=63, training=folder / "short")}, "text has 2 tokens"),
        (
            {"text": Text(prompts=("fine", "cut \udce2"))},
            r"--prompt 'cut \\udce2': holds half of a surrogate pair",
        ),
        ({"text": Text(prompts=("a student",), num_sample_tokens=63)}, "--prompt has 2 tokens and --sample"),
        (
            {"generation": dataclasses.replace(SETTINGS, max_new_tokens=64)},
            "longest prompt has 5 tokens and --max-new-tokens is 64",
        ),
        ({"out": folder}, "would go into the model's own folder"),
        (
            {
                "models": (one, NamedModel("other", folder / "larger")),
                "has_teacher": True,
                "text": Text(folder / "text.jsonl"),
            },
            "student has 99 words and the teacher 107",
        ),
        (
            {
                "models": (one, NamedModel("other", folder / "renamed")),
                "has_teacher": True,
                "text": Text(folder / "text.jsonl"),
            },
            r"student and the teacher have different tokenizers, so .*: id 85 is '\u2581over' in the teacher and "
            r"'\u2581lazy' in student \(2 ids mean different tokens\); leave",
        ),
        (
            {
                "models": (one, NamedModel("teacher", folder / "chat")),
                "has_teacher": True,
                "text": Text(folder / "new.jsonl", length=16),
            },
            "holds '<.new.>', id 91 of the teacher, which student does not have",
        ),
        (
            {"models": (NamedModel("x", folder / "unknown"),)},
            "unknown/config.json: transformers has no model type .*; give a model of a type",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(request(folder, **{"out": tmp_path, **changes}))


def test_a_model_whose_tensors_are_not_all_there_is_refused(folder: Path, tmp_path: Path) -> None:
    place, weights = Placement("cpu", "float32"), load_file(folder / "student/model.safetensors")
    damaged = tmp_path / "damaged"
    shutil.copytree(folder / "student", damaged)
    place.load(damaged)
    name = "model.layers.1.mlp.up_proj.weight"
    less = {key: value for key, value in weights.items() if key != name}
    for tensors in less, weights | {name: weights[name][:3].contiguous()}:
        save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=rf"damaged lacks 1 of the tensors .* shape \({name}\): copy"):
            place.load(damaged)
    (damaged / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"damaged does not load as a model \("):
        place.load(damaged)


def command(folder: Path, out: Path, *more: str, python: str) -> list[str]:
    sizes = "--max-prompt-tokens 20 --max-new-tokens 6 --batch-size 2 --seeds 10,20 --device cpu".split()
    model, data = ["--hf-model", str(folder / "student")], ["--data", str(folder / "data.jsonl")]
    return [python, str(TOOL), *model, *data, "--out", str(out), *sizes, *more]


@pytest.mark.tier("all")
def test_the_tool_killed_and_started_again(folder: Path, tmp_path: Path) -> None:
    evaluate(request(folder, tmp_path / "whole"))
    file = tmp_path / "out/student/answers/data.seed10.jsonl"
    killed = command(folder, tmp_path / "out", python=sys.executable)
    tool = subprocess.Popen(killed, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not file.exists():
        assert time.monotonic() < deadline
        assert tool.poll() is None
        time.sleep(0.002)
    tool.send_signal(signal.SIGKILL)
    tool.wait()
    assert not (tmp_path / "out/student/evaluation.json").exists()
    again = command(folder, tmp_path / "out", python=forked_python.python())
    done = subprocess.run(again, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith("ROUGE-L")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.tier("default")
def test_the_tool_refuses_in_one_line(folder: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"query": 1}\n')
    refused = command(folder, tmp_path / "out", "--data", str(bad), python=forked_python.python())
    done = subprocess.run(refused, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith(f"evaluate: error: {bad}, line 1: has the fields ['query']")
    assert len(done.stderr.splitlines()) == 1
