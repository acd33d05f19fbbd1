"""Processes that tokenise: only as many as have work, light ones, and with the ids of Megatron's tokenizer."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from megatron_fdd.data import workers
from megatron_fdd.data.chat_template import ChatSettings
from megatron_fdd.data.conversations import Conversation
from megatron_fdd.data.documents import RawDocument
from megatron_fdd.data.encode import EncodeSettings
from megatron_fdd.data.megatron_tokenizer import load_tokenizer, text_tokenizer
from megatron_fdd.data.tokenizer import TOKENIZER_TYPES, TokenizerSettings
from megatron_fdd.data.workers import BYTES_OF_A_WORKER, encode_in_order, useful_workers
from tests.data.conftest import CHATML, make_encoder, sentences
from tests.data.probes import Probe

ROOT = Path(__file__).parents[2]
# A template for a tokenizer that has no other control token.
CLOSED = "{% for m in messages %}{{ m.content }}{{ '[SEP]' if m.role == 'assistant' }} {% endfor %}"
CHAT = [
    {"role": "user", "content": "the river"},
    {"role": "assistant", "content": "play  "},
]
TEXTS = [
    *sentences(3),
    "",
    "  two  spaces\t\ttabs \n\n lines\r\n",
    "naïve 東京 🙂 \u200b\ufeff\x00",
    "<s>a</s><|endoftext|> <|im_start|>b [CLS] ☯ 12345",
]


@pytest.fixture(scope="module")
def settings(
    hf: TokenizerSettings, sp_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, TokenizerSettings]:
    """Return every type of tokenizer; Hugging Face's also with tokens around a sequence and one in Python."""
    folder = tmp_path_factory.mktemp("tokenizers")
    vocabulary = ["[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz.", *(f"##{c}" for c in "aeinorst")]
    pieces = Tokenizer(models.WordPiece({token: i for i, token in enumerate(vocabulary)}, unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer()
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    marks = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=pieces, **marks).save_pretrained(folder / "pieces")
    ByT5Tokenizer().save_pretrained(folder / "bytes")
    found = {name: TokenizerSettings(name, str(sp_model), CHATML) for name in TOKENIZER_TYPES[1:]}
    for name, template in (("pieces", CLOSED), ("bytes", CHATML)):
        found[name] = TokenizerSettings("HuggingFaceTokenizer", str(folder / name), template)
    return {"HuggingFaceTokenizer": hf, **found}


@pytest.mark.parametrize("name", [*TOKENIZER_TYPES, "pieces", "bytes"])
def test_ids_are_megatrons(settings: dict[str, TokenizerSettings], name: str) -> None:
    """They stay the same on the way to a worker."""
    megatron = load_tokenizer(settings[name])
    here = text_tokenizer(megatron)
    for tokenizer in (here, pickle.loads(pickle.dumps(here))):
        for text in TEXTS:
            ids = megatron.tokenize(text)
            assert tokenizer.ids(text) == ids
            for token_id in ids:
                assert tokenizer.text([token_id]) == megatron.detokenize([token_id])
        for prompt in (False, True):
            expected = megatron.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt)
            template = tokenizer.chat(ChatSettings())
            conversation = Conversation(tuple(CHAT), (False, True))
            assert template.render(conversation, len(CHAT), prompt=prompt) == expected
        assert (tokenizer.eod, tokenizer.bos) == (megatron.eod, -1 if megatron.bos is None else megatron.bos)
        assert tokenizer.chat_template == megatron.chat_template


def test_other_ids_than_megatrons_are_refused(hf: TokenizerSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    megatron = load_tokenizer(hf)
    wrapper = type(megatron._tokenizer)
    monkeypatch.setattr(wrapper, "text_to_ids", lambda self, text: self.tokenizer(text).input_ids[:-1])
    with pytest.raises(ValueError, match=r"HuggingFaceTokenizer gives .* other ids .*constraints.txt"):
        text_tokenizer(megatron)


@pytest.mark.parametrize(
    ("megabytes", "asked", "expected"), [(0, 8, 1), (7, 8, 1), (8, 8, 2), (8, 1, 1), (17, 8, 4), (99, 8, 8)]
)
def test_no_more_workers_than_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, megabytes: int, asked: int, expected: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    for name, share in (("a", 1), ("b", 2)):
        with open(tmp_path / name, "wb") as file:
            file.truncate(megabytes * share * 2**20 // 3 + 1)
    assert useful_workers(asked, [str(tmp_path / "a"), str(tmp_path / "b")]) == expected


@pytest.mark.parametrize("magic", [b"\x1f\x8b\x08\x00", b"\x28\xb5\x2f\xfd", b"PAR1"])
def test_what_is_compressed_counts_three_times(tmp_path: Path, magic: bytes) -> None:
    path = tmp_path / "packed"
    path.write_bytes(magic)
    os.truncate(path, BYTES_OF_A_WORKER)
    assert useful_workers(4, [str(path)]) == 3


def test_a_pipe_may_be_long(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert useful_workers(4, [str(tmp_path / "pipe")]) == 4
    assert useful_workers(10**9, [str(tmp_path / "pipe")]) == 4 * (os.cpu_count() or 1)


def documents(*texts: str) -> Iterator[RawDocument]:
    for line, text in enumerate(texts, 1):
        content = json.dumps({"text": text}).encode()
        yield RawDocument("a.jsonl", line, content, len(content))


@pytest.fixture
def one_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_BATCH_DOCUMENTS", 1)


@pytest.mark.tier("default")
@pytest.mark.parametrize("name", ["pieces", "bytes", "SentencePieceTokenizer"])
def test_a_worker_has_neither_torch_nor_megatron(
    settings: dict[str, TokenizerSettings], one_a_batch: None, name: str
) -> None:
    """The worker is asked after it has encoded a text and a chat."""
    probe = Probe(make_encoder(EncodeSettings(settings[name], "instruction")))
    chat = json.dumps({"messages": CHAT}).encode()
    pair = json.dumps({"prompt": "the river", "response": "report"}).encode()
    both = [
        RawDocument("a.jsonl", line, content, len(content)) for line, content in enumerate((chat, pair), 1)
    ]
    results = encode_in_order(iter(both), probe, 2, past_refusals=True)
    next(results)
    with pytest.raises(ValueError, match=rf"process \d+ of {os.getpid()} has \[\]"):
        next(results)


@pytest.mark.tier("default")
def test_a_worker_imports_neither_with_the_tool() -> None:
    """A spawned worker imports the program that started it, and the module of the pool."""
    code = (
        "import runpy, sys; runpy.run_path('tools/prepare_data.py', run_name='__mp_main__'); "
        "import megatron_fdd.data.workers; sys.exit(str({'torch', 'megatron', 'transformers'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip() == "set()"


@pytest.mark.tier("default")
def test_a_killed_worker_is_reported(hf: TokenizerSettings, one_a_batch: None) -> None:
    probe = Probe(make_encoder(EncodeSettings(hf, "jsonl")))
    with pytest.raises(ValueError, match="a worker process died.*fewer --workers"):
        list(encode_in_order(documents("the river", "die", "the house"), probe, 2, past_refusals=True))


@pytest.mark.tier("default")
def test_what_is_not_wanted_any_more_ends(hf: TokenizerSettings, one_a_batch: None) -> None:
    probe = Probe(make_encoder(EncodeSettings(hf, "jsonl")))
    before = multiprocessing.active_children()  # ranks of other tests
    signal.alarm(60)  # or this would wait for an hour
    results = encode_in_order(documents("the river", "wait", "wait"), probe, 2, past_refusals=True)
    next(results)
    results.close()  # type: ignore[attr-defined]
    signal.alarm(0)
    assert set(multiprocessing.active_children()) <= set(before)


@pytest.mark.parametrize(("past_refusals", "expected"), [(False, 2), (True, 3)])
def test_a_batch_ends_with_a_refusal(hf: TokenizerSettings, past_refusals: bool, expected: int) -> None:
    encoder = make_encoder(EncodeSettings(hf, "jsonl"))
    good, bad, last = (RawDocument("a.jsonl", 1, each, 9) for each in (b'{"text":""}', b"{", b'{"text":"a"}'))
    [(num_bytes, encoded)] = encode_in_order(iter([good, bad, last]), encoder, 1, past_refusals=past_refusals)
    assert (num_bytes, len(encoded)) == (9 * expected, expected)
    assert [each.refusal is None for each in encoded] == [True, False, True][:expected]


def test_a_tokenizer_that_cannot_be_copied_is_refused(hf: TokenizerSettings) -> None:
    encoder = make_encoder(EncodeSettings(hf, "jsonl"))
    encoder.tokenizer = dataclasses.replace(encoder.tokenizer, library=lambda text: None)
    with pytest.raises(
        ValueError, match="this tokenizer cannot be sent to workers .*prepare with --workers 1"
    ):
        next(encode_in_order(documents("the river"), encoder, 2, past_refusals=True))


def test_a_copy_with_other_ids_is_refused(
    hf: TokenizerSettings, sp: TokenizerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, copy = (make_encoder(EncodeSettings(settings, "jsonl")) for settings in (hf, sp))
    monkeypatch.setattr(workers.pickle, "loads", lambda content: copy)
    with pytest.raises(ValueError, match="this tokenizer gives other ids after .*prepare with --workers 1"):
        next(encode_in_order(documents("the river"), encoder, 2, past_refusals=True))


def test_the_help_names_the_threshold() -> None:
    assert BYTES_OF_A_WORKER == 4 * 2**20
    assert "one for each 4 MB of input" in (ROOT / "megatron_fdd/cli/prepare_data.py").read_text()
