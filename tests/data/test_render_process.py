"""Chat templates run in a process of their own, which leaves nothing behind and holds nothing of its parent's."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from click.testing import CliRunner

from megatron_fdd.cli.prepare_data import command
from megatron_fdd.data import render_limits
from megatron_fdd.data.documents import RawDocument
from megatron_fdd.data.encode import EncodeSettings
from megatron_fdd.data.render_limits import TemplateLimitError, limited
from megatron_fdd.data.render_process import ProcessEndedError, RenderProcess, TemplateRaisedError
from megatron_fdd.data.tokenizer import TokenizerSettings
from megatron_fdd.data.workers import encode_in_order
from tests.data.chat_templates import chat_template
from tests.data.conftest import make_encoder, write_jsonl
from tests.data.probes import Hurried
from tests.hostile.tools import ENDLESS

CHAT = {"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "river"}]}
SEARCH = ENDLESS["search in one call"]
LATE = "computes for more than 0.2 s on one conversation); change the record, or give another template with"


def search_for_ever() -> int:
    return ("a" * 8_000_000).rfind("ab" + "a" * 4_000_000)


def test_answers_errors_and_an_end() -> None:
    process = RenderProcess()
    assert process.call(5, divmod, 7, 2) == (3, 1)
    with pytest.raises(TemplateRaisedError, match="by zero") as raised:
        process.call(5, divmod, 7, 0)
    assert raised.value.kind == "ZeroDivisionError"
    assert process.call(5, os.getpid) == process._pid
    with pytest.raises(ProcessEndedError, match="status 9") as ended:
        process.call(5, os._exit, 9)
    assert not ended.value.is_late


def test_its_time_is_up_in_the_middle_of_one_call() -> None:
    process = RenderProcess()
    with pytest.raises(ProcessEndedError, match="SIGPROF") as ended:
        process.call(0.1, search_for_ever)
    assert ended.value.is_late


def test_an_interrupt_is_heard_and_ends_it() -> None:
    process = RenderProcess()
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            process.call(60, search_for_ever)
    finally:
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(ProcessLookupError):
        os.kill(process._pid, 0)


def test_it_ends_with_its_parent_and_holds_no_lock(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        process = RenderProcess()
        process.call(5, os.getpid)
    with (tmp_path / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    process._connection.close()
    assert os.waitpid(process._pid, 0)[1] == 0


def test_the_compiler_is_limited_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """It computes constants, also where only the marks are looked for."""
    monkeypatch.setattr(render_limits, "SECONDS", 0.2)
    text = "{{ ('ab' * 4000000) | sort | length }}{% generation %}{% endgeneration %}"
    with pytest.raises(TemplateLimitError, match="computes for more than"):
        chat_template(text).has_marks(with_tools=False)


def test_the_end_of_the_process_is_a_limit() -> None:
    for _ in range(3):
        with pytest.raises(TemplateLimitError, match=r"ends the process that runs it \(status 9\)"):
            limited("of this test", os._exit, 9)
    with pytest.raises(TemplateLimitError, match="earlier conversations"):
        limited("of this test", os.getpid)
    assert limited("another", os.getpid) == limited("another", os.getpid) != os.getpid()


@pytest.mark.parametrize("name", ["search in one call", "comparison in one call", "hash in one call"])
@pytest.mark.parametrize("shows", [False, True])
def test_prepare_ends_in_one_line(
    name: str, shows: bool, hf: TokenizerSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render_limits, "SECONDS", 0.2)
    (tmp_path / "template.jinja").write_text(ENDLESS[name])
    source = write_jsonl(tmp_path / "a.jsonl", [CHAT])
    sets = tmp_path / "sets"
    words = [source, "--tokenizer-type", hf.tokenizer_type, "--tokenizer-model", hf.tokenizer_model]
    words += ["--chat-template", str(tmp_path / "template.jinja"), "--output-prefix", str(sets / "out")]
    ended = CliRunner().invoke(command, [*words, *(["--show", "1"] if shows else [])])
    assert ended.exit_code == 1
    [line] = ended.stderr.splitlines()
    assert LATE in line
    assert f"a.jsonl, line 1: the chat template {tmp_path / 'template.jinja'} refuses it" in line
    assert not sets.exists() or list(sets.iterdir()) == []


def test_the_tokenizers_own_template_is_named(hf: TokenizerSettings, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    shutil.copytree(hf.tokenizer_model, folder)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('not today') }}")
    source = write_jsonl(tmp_path / "a.jsonl", [CHAT])
    words = [source, "--tokenizer-type", hf.tokenizer_type, "--tokenizer-model", str(folder)]
    ended = CliRunner().invoke(command, [*words, "--output-prefix", str(tmp_path / "out")])
    assert f"a.jsonl, line 1: the chat template of {folder} refuses it (" in ended.stderr


@pytest.mark.tier("default")
def test_a_worker_refuses_the_record_and_goes_on(hf: TokenizerSettings) -> None:
    settings = TokenizerSettings(hf.tokenizer_type, hf.tokenizer_model, SEARCH)
    content = json.dumps(CHAT).encode()
    pair = json.dumps({"prompt": "the", "response": "river"}).encode()
    documents = [
        RawDocument("a.jsonl", line, each, len(each)) for line, each in enumerate((content, pair), 1)
    ]
    encoder = Hurried(make_encoder(EncodeSettings(settings, "instruction")), 0.2)
    [(_, [late, good])] = encode_in_order(documents, encoder, 2, past_refusals=True)
    assert LATE in str(late.refusal)
    assert good.refusal is None
