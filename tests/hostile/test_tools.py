"""Damaged files and templates gone wrong end in one line, in a short time, in every tool that reads them."""

from __future__ import annotations

import builtins
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from megatron_fdd.cli.report import command as report_command
from megatron_fdd.convert.hf_folder import HfFolder
from megatron_fdd.convert.vocabulary import copy_tokenizer
from megatron_fdd.data import index_cache, render_limits
from megatron_fdd.data.chat import ChatSampler
from megatron_fdd.data.chat_template import ChatSettings
from megatron_fdd.data.parts import Parts, kept_documents
from megatron_fdd.data.prepared import open_set
from megatron_fdd.data.refusals import Refusal
from megatron_fdd.data.tokenizer import check_tokenizer_files
from megatron_fdd.evaluate.answers import AnswersFile
from megatron_fdd.evaluate.models import NamedModel, Placement, num_positions
from megatron_fdd.evaluate.perplexity import read_texts
from megatron_fdd.evaluate.report import write_report
from megatron_fdd.evaluate.report.runs import read_runs
from megatron_fdd.host import pipe
from megatron_fdd.host.json_file import read_json
from megatron_fdd.step.metrics import MetricsFile, check_metrics_file
from megatron_fdd.teach import __main__ as producer
from tests.convert import toys
from tests.data.chat_templates import chat_template
from tests.evaluate import report_files
from tests.hostile import configs, tools


@pytest.mark.parametrize(("path", "value", "allowed"), tools.EVALUATIONS)
def test_an_evaluation_with_a_part_of_another_type(
    path: str, value: Any, allowed: str, tmp_path: Path
) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps(tools.changed(path, value)))
    with pytest.raises(ValueError, match=rf'evaluation\.json has "{path}": .*, which must be {allowed}'):
        read_runs([str(tmp_path)])


@pytest.mark.parametrize(("content", "message"), tools.NO_EVALUATIONS, ids=range(len(tools.NO_EVALUATIONS)))
def test_no_evaluation(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=rf"evaluation\.json .*{message}"):
        read_runs([str(tmp_path)])


@pytest.mark.parametrize(("line", "message"), tools.METRICS, ids=range(len(tools.METRICS)))
def test_a_line_of_metrics_that_is_none(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"iteration": 1, "total": 1.0}}\n{line}\n{{"iteration": 3, "total": 1.0}}\n')
    with pytest.raises(ValueError, match=rf"metrics\.jsonl, {message}"):
        read_runs([str(path)])


def test_numbers_of_metrics_that_are_none_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [
        f'{{"iteration": {n}, "total": 1.0, "kd": {value}}}' for n, value in enumerate(tools.LEFT_OUT, 1)
    ]
    path.write_text("\n".join(lines) + "\n")
    [run] = read_runs([str(path)])
    assert run.metrics is not None
    assert run.metrics.curves.keys() == {"iteration", "total"}
    assert run.metrics.last == len(tools.LEFT_OUT)


@pytest.mark.tier("default")
def test_a_report_of_extreme_numbers(tmp_path: Path) -> None:
    values = [1e299, -1e299, 1e-300, 0.0, 5.0]
    records = [report_files.record(10**15 - 9 + n, kd=value, total=-value) for n, value in enumerate(values)]
    report_files.write(tmp_path / "run" / "metrics.jsonl", records)
    report_files.write_evaluation(tmp_path / "run", mean=1e299, spread=1e-300)
    assert write_report([str(tmp_path / "run")], tmp_path / "report").pictures


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def imports(name: str, *args: Any, **keywords: Any) -> Any:
        if name == "megatron_fdd.evaluate.report":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real(name, *args, **keywords)

    monkeypatch.setattr(builtins, "__import__", imports)
    ended = CliRunner().invoke(report_command, [str(tmp_path), "--out", str(tmp_path / "report")])
    assert ended.exit_code == 1
    assert ended.stderr == "report: error: a report needs matplotlib: pip install 'megatron_fdd[evaluate]'\n"


@pytest.mark.parametrize("line", tools.NO_RECORDS)
def test_a_run_that_resumes_into_a_file_of_no_records(line: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"iteration": 1, "total": 1.0}}\n{line}\n{{"iteration": 3}}\n')
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"^--fdd-metrics-file .* something else than metrics \(line 2\)"):
        check_metrics_file(str(path))
    assert path.read_bytes() == before


@pytest.mark.parametrize("torn", ["", '{"itera', '{"iteration": 2, "tot', tools.DEEP])
def test_a_run_that_resumes_after_a_torn_line(torn: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = '{"iteration": 1, "total": 1.0}\n'
    path.write_text(whole + (torn if torn != tools.DEEP else '{"iteration": 2, "kd": ' + torn))
    check_metrics_file(str(path))
    MetricsFile(str(path), 5)
    assert path.read_text() == whole


@pytest.mark.parametrize("content", tools.NO_ANSWERS, ids=range(len(tools.NO_ANSWERS)))
def test_a_file_of_answers_that_holds_none(content: str, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(content)
    with pytest.raises(
        ValueError, match=r"answers\.jsonl does not hold answers: delete it or give another --out"
    ):
        AnswersFile(path, {"seed": 10})


def load_model(folder: Path) -> None:
    num_positions(NamedModel("m", folder).config())
    Placement("cpu", "float32").load(folder)


@pytest.mark.parametrize("name", tools.MODELS)
def test_a_model_that_cannot_be_evaluated(name: str, tmp_path: Path) -> None:
    write, message = tools.MODELS[name]
    write(tmp_path)
    started_s = time.process_time()
    with pytest.raises(ValueError, match=message) as refused:
        load_model(tmp_path)
    assert "\n" not in str(refused.value)
    assert time.process_time() - started_s < 10


def test_pickled_weights_run_nothing(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, capsys: pytest.CaptureFixture[str]
) -> None:
    toys.write_json(tmp_path / "config.json", toys.llama_config())
    tools.write_pickle(tmp_path, tmp_path / "sign")
    with pytest.raises(ValueError, match=r"its \.bin file .*; give the model as safetensors$"):
        Placement("cpu", "float32").load(tmp_path)
    assert not [each for each in recwarn if "pickle" in str(each.message)]
    assert "weights_only" not in capsys.readouterr().err
    assert not (tmp_path / "sign").exists()


@pytest.mark.parametrize("changes", [{"vocab_size": 10**8}, {"hidden_size": 10**6}])
def test_far_too_few_weights(changes: dict[str, int], tmp_path: Path) -> None:
    """transformers would fill gigabytes with random numbers before it says that the shapes differ."""
    toys.make_llama(tmp_path / "m", tokenizer=False)
    toys.write_json(tmp_path / "m" / "config.json", {**toys.llama_config(), **changes})
    with pytest.raises(
        ValueError, match=r"a model of [\d,]{10,} weights or more, .* belong to different models; copy"
    ):
        Placement("cpu", "float32").load(tmp_path / "m")


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize(("file", "message"), configs.SHARDS, ids=lambda each: str(each)[:20])
def test_an_evaluation_reads_no_file_outside(index: str, file: Any, message: str, tmp_path: Path) -> None:
    toys.write_json(tmp_path / "config.json", toys.llama_config())
    toys.write_json(tmp_path / index, {"weight_map": {"a": file}})
    with pytest.raises(ValueError, match=message):
        Placement("cpu", "float32").load(tmp_path)


def test_ids_beyond_the_embeddings(tmp_path: Path) -> None:
    toys.write_json(tmp_path / "config.json", toys.llama_config())
    model = NamedModel("m", tmp_path)
    model.check_ids(98)
    with pytest.raises(ValueError, match=r"the tokenizer gives the id 99, and the model has 99 embeddings"):
        model.check_ids(99)


@pytest.mark.tier("default")
@pytest.mark.parametrize("name", tools.TEMPLATES)
def test_a_chat_template_gone_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render_limits, "SECONDS", 0.3)
    text, message = tools.TEMPLATES[name]
    sampler = ChatSampler(chat_template(text), ChatSettings())
    started_s = time.process_time()
    for _ in range(10):
        with pytest.raises(Refusal, match=rf"^x, line 1: .*{message}|earlier conversations") as refused:
            sampler.samples(tools.QUESTION, "x, line 1", Counter())
        assert "\n" not in str(refused.value)
    assert time.process_time() - started_s < 10


def test_a_chat_template_gone_wrong_on_what_the_summary_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render_limits, "SECONDS", 0.3)
    text, _ = tools.TEMPLATES["endless in our own texts"]
    assert chat_template(text.replace("vxwq", "qkzj")).preamble == ""


def test_python_files_beside_a_model_do_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is asked whether to run them either: on a terminal transformers would ask, and take a yes."""
    asked = []
    monkeypatch.setattr(builtins, "input", lambda _: asked.append("") or "yes")
    folder, sign = tmp_path / "model", tmp_path / "sign"
    tools.write_program(folder, sign)
    model = NamedModel("m", folder)
    for load in (model.config, model.tokenizer, lambda: Placement("cpu", "float32").load(folder)):
        with pytest.raises(ValueError, match="custom code|code of a folder is not run"):
            load()
    copy_tokenizer(folder, tmp_path / "copy")
    assert not asked
    assert not sign.exists()


def test_a_store_that_cannot_be_written_is_refused_before_the_teacher_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(producer, "together", nullcontext)
    (tmp_path / "file").touch()
    request: Any = SimpleNamespace(store=tmp_path / "file" / "store")
    teacher: Any = SimpleNamespace(engine=lambda: pytest.fail("the teacher is loaded"))
    with pytest.raises(ValueError, match=r"^--store .* is a file, and a folder is needed"):
        producer._compute(request, teacher, [], None)  # type: ignore[arg-type]


def _of_a_model(folder: Path) -> None:
    toys.write_json(folder / "config.json", toys.llama_config())
    assert HfFolder(folder).tensors


# A file that is a pipe without a writer, what opens it, and what is said of it; None: it counts as damaged.
PIPES: dict[str, tuple[Callable[[Path], object], str | None]] = {
    "config.json": (lambda folder: read_json(folder / "config.json"), "config.json is no regular file"),
    "model.safetensors": (_of_a_model, "holds neither model.safetensors"),
    "a.jsonl": (lambda folder: read_texts(folder / "a.jsonl"), "a.jsonl is a pipe, and nothing writes to it"),
    "tokenizer.model": (
        lambda folder: check_tokenizer_files("SentencePieceTokenizer", str(folder / "tokenizer.model")),
        "is neither a file nor a folder",
    ),
    ".set.partial/lock": (
        lambda folder: Parts([str(folder / "set")], "set", "text", None, None),  # type: ignore[arg-type]
        "lock: is a pipe, and a regular file is needed",
    ),
    ".set.partial/progress.json": (lambda folder: kept_documents(str(folder / "set")) == 0, None),
    "set.prepared.json": (lambda folder: open_set(str(folder / "set")), "prepared.json is no regular file"),
    "set.bin": (lambda folder: open_set(str(folder / "set")), "set.bin is no regular file"),
    "a-TextDataset-b-document_index.npy": (
        lambda folder: index_cache._fault(folder / "a-TextDataset-b-document_index.npy"),
        None,
    ),
}


@pytest.mark.parametrize("name", PIPES)
def test_a_pipe_is_not_waited_for(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe, "_WRITER_S", 0.1)
    read, message = PIPES[name]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / name)
    signal.alarm(20)
    if message is None:
        assert read(tmp_path)
    else:
        with pytest.raises(ValueError, match=message):
            read(tmp_path)
    signal.alarm(0)
