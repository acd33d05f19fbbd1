"""A tokenizer.json that its library fails on ends in one line with the file, and its padding has no effect."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from megatron_fdd.convert.hf_writer import new_folder
from megatron_fdd.convert.token_bytes import TokenBytes
from megatron_fdd.convert.vocabulary import copy_tokenizer
from megatron_fdd.data.documents import RawDocument
from megatron_fdd.data.encode import Encoder, EncodeSettings
from megatron_fdd.data.megatron_tokenizer import load_tokenizer, text_tokenizer
from megatron_fdd.data.tokenizer import TokenizerSettings
from megatron_fdd.data.tokenizer_identity import encoded_by, identity_of_folder
from megatron_fdd.evaluate.models import NamedModel
from megatron_fdd.host.panics import panics_as_errors, unprinted_panics
from megatron_fdd.losses.lens import LENSES, LensKind
from megatron_fdd.plan.megatron_errors import megatrons_errors
from megatron_fdd.step.teacher.lens_file import TeacherIdentity, write_lens
from tests.data.tokenizer_identity import variants

# Two fields with which the library panics at any text, and a pattern with which it does at some.
PANICS = {
    "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA"},
    "pre_tokenizer": {"type": "FixedLength", "length": 0},
}
SLOW_PATTERN = r"§(\w+\s?)+\w*[^\w\s]$"
SLOW_TEXT = "§" + "hello x x abcabc " * 3
PADDING = {
    "strategy": {"Fixed": 1 << 40},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "x",
}
TRUNCATION = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
LENGTHS = [
    {"padding": PADDING},
    {"padding": {**PADDING, "strategy": "BatchLongest", "pad_to_multiple_of": 1 << 40}},
    {"truncation": TRUNCATION},
    {"truncation": {**TRUNCATION, "stride": 5}},
]


def write(folder: Path, **fields: Any) -> Path:
    return variants.write(folder, {**variants.base(), **fields})


def prepare(folder: Path) -> Encoder:
    settings = TokenizerSettings("HuggingFaceTokenizer", str(folder))
    return Encoder(EncodeSettings(settings, "jsonl"), text_tokenizer(load_tokenizer(settings)))


def evaluate(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    NamedModel("own", folder).tokenizer()


def import_it(folder: Path) -> None:
    copy_tokenizer(folder, folder.with_name("copy"))


@pytest.mark.parametrize("command", [prepare, evaluate, import_it])
@pytest.mark.parametrize("field", PANICS)
def test_a_panic_names_the_users_file(
    field: str, command: Callable[[Path], object], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "own", **{field: PANICS[field]})
    with pytest.raises(ValueError, match=r"; copy (it|its files) again") as refused:
        command(folder)
    said = str(refused.value)
    assert str(folder) in said
    assert "\n" not in said
    assert "panicked" not in capfd.readouterr().err, "Rust would print four lines more"


def test_a_text_that_panics_is_refused_with_its_place(tmp_path: Path) -> None:
    folder = write(tmp_path / "own", **variants.variant(variants.with_pattern(SLOW_PATTERN)))
    encoder = prepare(folder)
    row = json.dumps({"text": SLOW_TEXT}).encode()
    refusal = encoder(RawDocument("x.jsonl", 7, row, len(row))).refusal
    assert refusal is not None
    assert refusal.where == "x.jsonl, line 7"
    assert "cannot be encoded" in refusal.detail
    assert "retry-limit-in-match over" in refusal.detail
    library = encoder.tokenizer.library  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=rf"tokenizer of {folder} cannot encode the text '§hello") as refused:
        encoded_by(library, ["a b", SLOW_TEXT])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("fields", LENGTHS, ids=["length", "multiple", "truncation", "stride"])
def test_padding_and_truncation_have_no_effect(fields: dict[str, Any], tmp_path: Path) -> None:
    text = "a box of 1234 foxes, and two  more"
    plain, odd = (
        identity_of_folder(write(tmp_path / name, **rest)) for name, rest in (("a", {}), ("b", fields))
    )
    assert plain.encode is not None
    assert odd.encode is not None
    assert odd.encode(text) == plain.encode(text)
    import_it(tmp_path / "b")  # whose copy gives the same ids in training
    [encoded] = encoded_by(prepare(tmp_path / "copy").tokenizer.library, [text])  # type: ignore[attr-defined]
    assert encoded == plain.encode(text)


def test_a_tokenizer_that_leaves_out_the_text(tmp_path: Path) -> None:
    both = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    empty = {"type": "TemplateProcessing", "single": [], "pair": both, "special_tokens": {}}
    folder = write(tmp_path, post_processor=empty)
    with pytest.raises(ValueError, match=f'^--tokenizer-model {folder} leaves out the text .*"single"'):
        prepare(folder)


def test_a_text_of_which_nothing_is_left(tmp_path: Path) -> None:
    nothing = {"type": "Replace", "pattern": {"String": "\u200b"}, "content": ""}
    encoded = prepare(write(tmp_path, normalizer=nothing))(RawDocument("x", 1, b'{"text": "\\u200b"}', 18))
    assert not encoded.samples
    assert encoded.refusal is None


def test_a_tokenizer_json_that_is_none(tmp_path: Path) -> None:
    folder = write(tmp_path / "own")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON") as refused:
        import_it(folder)
    assert str(refused.value).startswith(f"{folder}/tokenizer.json")
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}, "type": "none"}}))
    with pytest.raises(ValueError, match="cannot be read as a tokenizer"):
        TokenBytes.read(folder)


def test_no_message_names_a_scratch_folder(tmp_path: Path) -> None:
    final = tmp_path / "new"
    with pytest.raises(ValueError, match=f"^{final}/x is wrong$"), new_folder(final, "--save") as unfinished:  # noqa: PT012
        assert unfinished != final
        raise ValueError(f"{unfinished}/x is wrong")


def test_a_lens_of_the_wrong_shape_names_the_users_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "low.safetensors"
    monkeypatch.setitem(LENSES, "own", LensKind({"bias": "T"}, lambda hidden, tensors, norm: norm(hidden)))
    with pytest.raises(ValueError, match=rf"^lens file {path}: 1\.bias has the shape"):
        write_lens(path, "own", TeacherIdentity(2, 8, ""), {1: {"bias": torch.zeros(3)}})


def test_only_panics_become_errors() -> None:
    with pytest.raises(KeyboardInterrupt), panics_as_errors():
        raise KeyboardInterrupt


def test_what_is_printed_beside_a_panic_stays(capfd: pytest.CaptureFixture[str]) -> None:
    panic = "thread '<unnamed>' (7) panicked at a.rs:1:2:\nsaid\nnote: run with ...\n"

    @unprinted_panics()
    def work(error: type[Exception] | None) -> None:
        os.write(2, f"a warning\n\n{panic}".encode())
        if error is not None:
            raise error

    with pytest.raises(ZeroDivisionError):
        work(ZeroDivisionError)
    assert capfd.readouterr().err == "a warning\n"
    work(None)
    assert capfd.readouterr().err == f"a warning\n\n{panic}", "nothing else tells it"


def test_a_panic_where_megatron_loads_the_tokenizer(tmp_path: Path) -> None:
    folder = write(tmp_path / "own", pre_tokenizer=PANICS["pre_tokenizer"])
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"^--tokenizer-model X is damaged, copy it again: chunk size"):  # noqa: SIM117
        with (
            megatrons_errors("these flags"),
            panics_as_errors("--tokenizer-model X is damaged, copy it again"),
        ):
            backend.encode("a b")
