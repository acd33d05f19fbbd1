"""Preparing, from raw files to sets on disk: content, workers, errors, interruptions."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import AutoTokenizer

from megatron_fdd.data import prepared as prepared_module
from megatron_fdd.data import workers
from megatron_fdd.data.documents import JsonKeys
from megatron_fdd.data.encode import EMPTY_DOCUMENTS, EncodeSettings
from megatron_fdd.data.prepare import PrepareSettings, Summary, look, prepare
from megatron_fdd.data.prepared import mask_prefix, open_set
from megatron_fdd.data.show import shown
from megatron_fdd.data.tokenizer import TokenizerSettings
from tests.data.conftest import sentences, write_jsonl
from tests.harness import forked_python

TOOL = Path(__file__).parents[2] / "tools" / "prepare_data.py"


def run(inputs: list[str], prefix: Path, encode: EncodeSettings, **more: object) -> Summary:
    return prepare(PrepareSettings(tuple(inputs), str(prefix), encode, **more))


def documents_of(prefix: Path | str) -> list[list[int]]:
    dataset = IndexedDataset(str(prefix))
    return [dataset[index].tolist() for index in range(len(dataset))]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_text_round_trip(hf: TokenizerSettings, tmp_path: Path) -> None:
    texts = ["\n".join(sentences(3, seed)) for seed in range(4)]
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    encode = EncodeSettings(hf, "text", append_eod=True)
    summary = run([str(tmp_path / "a.txt")], tmp_path / "out", encode, separator="blank-line")
    reference = AutoTokenizer.from_pretrained(hf.tokenizer_model)
    expected = [[*reference(text).input_ids, reference.eos_token_id] for text in texts]
    assert documents_of(tmp_path / "out") == expected
    assert (summary.tally.documents, summary.tally.tokens) == (4, sum(map(len, expected)))
    found = open_set(str(tmp_path / "out"))
    assert found.info.largest_token_id == max(map(max, expected))
    assert found.info.smallest_token_id == min(map(min, expected))
    assert found.info.longest_document == max(map(len, expected))


def test_jsonl_round_trip_with_sentencepiece(sp: TokenizerSettings, tmp_path: Path) -> None:
    texts = sentences(5)
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in [*texts, "  "]])
    summary = run([path], tmp_path / "out", EncodeSettings(sp, "jsonl"))
    model = sentencepiece.SentencePieceProcessor(model_file=sp.tokenizer_model)
    assert documents_of(tmp_path / "out") == model.encode(texts)
    assert summary.tally.notes[EMPTY_DOCUMENTS] == 1


@pytest.mark.parametrize("name", ["text.bin", "text.idx", "linked.bin"])
def test_an_input_is_never_the_output(name: str, hf: TokenizerSettings, tmp_path: Path) -> None:
    (tmp_path / name).write_text("the quick fox\n")
    given = tmp_path / name
    if name == "linked.bin":
        (tmp_path / "text.txt").symlink_to(given)
        given = tmp_path / "text.txt"
    with pytest.raises(ValueError, match=rf"{name} is an input; give another prefix"):
        run([given], tmp_path / name.partition(".")[0], EncodeSettings(hf, "text"))
    assert given.read_text() == "the quick fox\n"


def test_a_set_that_is_there_is_replaced_only_when_asked(hf: TokenizerSettings, tmp_path: Path) -> None:
    first, second = (
        write_jsonl(tmp_path / f"{seed}.jsonl", [{"text": sentences(1, seed)[0]}]) for seed in (1, 2)
    )
    encode = EncodeSettings(hf, "jsonl")
    run([first], tmp_path / "out", encode)
    before = documents_of(tmp_path / "out")
    with pytest.raises(ValueError, match=r"out: a prepared set exists already.*--overwrite"):
        run([second], tmp_path / "out", encode)
    assert documents_of(tmp_path / "out") == before
    run([second], tmp_path / "out", encode, overwrite=True)
    assert documents_of(tmp_path / "out") != before


def test_when_all_are_refused_the_reasons_are_told(hf: TokenizerSettings, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "x"}]}] * 3)
    encode = EncodeSettings(hf, "instruction")
    told = (
        r"(?s)nothing is left to .*3: nothing in it is learned.*a\.jsonl, line 1: no message of the assistant"
    )
    with pytest.raises(ValueError, match=told):
        run([path], tmp_path / "out", encode, skip_refused=True)
    with pytest.raises(ValueError, match=told):
        look(PrepareSettings((path,), "", encode, skip_refused=True, show=2))


def test_what_is_shown_names_what_was_refused_on_the_way(hf: TokenizerSettings, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "x"}, *instruction_rows(3)])
    encode = EncodeSettings(hf, "instruction")
    tokenizer, samples, seen = look(PrepareSettings((path,), "", encode, skip_refused=True, show=2))
    assert (len(samples), seen.refused.total()) == (2, 1)
    plain, coloured = ("\n".join(shown(tokenizer, samples, in_colour=colour)) for colour in (False, True))
    row = instruction_rows(1)[0]
    assert f"{row['prompt']}[[{row['response']}<|endoftext|>]]" in plain
    assert f"\033[32m{row['response']}<|endoftext|>\033[0m" in coloured
    run([path], tmp_path / "out", encode, skip_refused=True, show=2)
    written = (tmp_path / "out.samples.html").read_text()
    assert f"<b>{row['response']}&lt;|endoftext|&gt;</b>" in written


def test_a_prefix_where_nothing_can_be_written_is_named(hf: TokenizerSettings, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    (tmp_path / "file").touch()
    for prefix in (Path("/proc/x"), tmp_path / "file" / "x"):
        with pytest.raises(ValueError, match=rf"--output-prefix {prefix}: cannot be written"):
            run([path], prefix, EncodeSettings(hf, "jsonl"))


def test_a_full_disk_names_the_prefix(
    hf: TokenizerSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    monkeypatch.setattr(prepared_module.SetWriter, "add", full)
    with pytest.raises(
        ValueError, match=rf"^--output-prefix {tmp_path}/out: cannot be written: .*; make room there"
    ):
        run([path], tmp_path / "out", EncodeSettings(hf, "jsonl"))


def instruction_rows(count: int) -> list[dict[str, object]]:
    return [
        {"prompt": a + " ", "response": b}
        for a, b in zip(sentences(count, 1), sentences(count, 2), strict=True)
    ]


def test_instructions_have_a_mask_beside_the_ids(hf: TokenizerSettings, tmp_path: Path) -> None:
    rows = instruction_rows(6)
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    summary = run([path], tmp_path / "out", EncodeSettings(hf, "instruction", seq_length=20))
    reference = AutoTokenizer.from_pretrained(hf.tokenizer_model)
    expected_ids, expected_masks, truncated = [], [], 0
    for row in rows:
        prompt = reference(row["prompt"]).input_ids
        ids = [*reference(row["prompt"] + row["response"]).input_ids, reference.eos_token_id]
        if len(prompt) < 21:
            expected_ids.append(ids[:21])
            truncated += len(ids) > 21
            expected_masks.append(([0] * len(prompt) + [1] * (len(ids) - len(prompt)))[:21])
    assert documents_of(tmp_path / "out") == expected_ids
    assert documents_of(mask_prefix(str(tmp_path / "out"))) == expected_masks
    assert summary.tally.truncated == truncated > 0
    info = open_set(str(tmp_path / "out")).info
    assert (info.kind, info.learned_tokens) == ("instruction", sum(map(sum, expected_masks)))


@pytest.mark.tier("default")
def test_error_in_a_worker_is_the_first_in_the_file(
    hf: TokenizerSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "BYTES_OF_A_WORKER", 1)
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "the river"}] * 3 + [{"other": "x"}, {"text": 3}])
    with pytest.raises(ValueError, match=r"a.jsonl, line 4: the field 'text' is missing"):
        run([path], tmp_path / "sets" / "out", EncodeSettings(hf, "jsonl"), workers=2)
    assert contents(tmp_path / "sets") == {}


def test_split_deals_documents_by_their_shares(hf: TokenizerSettings, tmp_path: Path) -> None:
    texts = [f"{n} {text}" for n, text in enumerate(sentences(40))]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    summary = run([path], tmp_path / "out", EncodeSettings(hf, "jsonl"), split=(8.0, 1.0, 1.0))
    parts = [documents_of(prefix) for prefix in summary.prefixes]
    assert [os.path.basename(prefix) for prefix in summary.prefixes] == ["out_train", "out_valid", "out_test"]
    assert [len(part) for part in parts] == [32, 4, 4]
    reference = AutoTokenizer.from_pretrained(hf.tokenizer_model)
    dealt = sorted(tuple(ids) for part in parts for ids in part)
    assert dealt == sorted(tuple(reference(text).input_ids) for text in texts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": ("nowhere.txt",)}, "input file nowhere.txt does not exist"),
        ({"inputs": (".",)}, "is a folder"),
        ({"workers": 0}, "--workers 0: at least 1"),
        ({"split": (1.0,)}, "--split 1.0: give 2 or 3"),
        ({"split": (1.0, 0.0)}, "--split 1.0,0.0: give 2 or 3"),
        ({"split": (99.0, 1.0)}, "no document for .*out_valid .1 for the other"),
        ({"output_prefix": "sets/"}, "--output-prefix sets/ is a folder"),
    ],
)
def test_refused(hf: TokenizerSettings, tmp_path: Path, change: dict[str, object], message: str) -> None:
    (tmp_path / "a.txt").write_text("the river")
    good = PrepareSettings(
        (str(tmp_path / "a.txt"),), str(tmp_path / "sets" / "out"), EncodeSettings(hf, "text")
    )
    with pytest.raises(ValueError, match=message):
        prepare(dataclasses.replace(good, **change))
    assert not (tmp_path / "sets").exists() or contents(tmp_path / "sets") == {}


def test_a_template_is_for_instructions(hf: TokenizerSettings, tmp_path: Path) -> None:
    encode = EncodeSettings(hf, "text", template="alpaca")
    with pytest.raises(ValueError, match="--template alpaca is for instructions"):
        run([str(tmp_path / "a.txt")], tmp_path / "out", encode)
    encode = EncodeSettings(hf, "instruction", JsonKeys(prompt="question"), template="alpaca")
    with pytest.raises(ValueError, match="--template alpaca finds the fields by the layout"):
        run([str(tmp_path / "a.jsonl")], tmp_path / "out", encode)


def test_failing_keeps_the_old_set(hf: TokenizerSettings, tmp_path: Path) -> None:
    good = write_jsonl(tmp_path / "good.jsonl", [{"text": "the river"}])
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n\n{"text": \n')
    run([good], tmp_path / "sets" / "out", EncodeSettings(hf, "jsonl"))
    before = contents(tmp_path / "sets")
    with pytest.raises(ValueError, match=r"bad.jsonl, line 3: malformed JSON"):
        run(
            [str(tmp_path / "bad.jsonl")],
            tmp_path / "sets" / "out",
            EncodeSettings(hf, "jsonl"),
            overwrite=True,
        )
    assert contents(tmp_path / "sets") == before


def test_stopped_while_replacing_never_looks_whole(
    hf: TokenizerSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An instruction set replaces a text set, and is stopped before each of its renames in turn."""
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": "the river"}])
    path = write_jsonl(tmp_path / "a.jsonl", instruction_rows(3))
    prefix = tmp_path / "sets" / "out"

    def stop_at(number: int) -> None:
        calls = iter(range(number))

        def replace(source: str, target: str) -> None:
            if next(calls, None) is None:
                raise KeyboardInterrupt
            os.rename(source, target)

        monkeypatch.setattr(prepared_module.os, "replace", replace)

    for renames in range(5):
        monkeypatch.undo()
        run([text], prefix, EncodeSettings(hf, "jsonl"), overwrite=True)
        stop_at(renames)
        with pytest.raises(KeyboardInterrupt):
            run([path], prefix, EncodeSettings(hf, "instruction"), overwrite=True)
        with pytest.raises(ValueError, match=r"out.(idx|bin) does not exist"):
            open_set(str(prefix))
        assert not IndexedDataset.exists(str(prefix))
    monkeypatch.undo()
    run([path], prefix, EncodeSettings(hf, "instruction"), overwrite=True)
    assert open_set(str(prefix)).info.documents == 3
    run([text], prefix, EncodeSettings(hf, "jsonl"), overwrite=True)
    assert open_set(str(prefix)).info.kind == "text"


def test_damaged_sets_are_found(hf: TokenizerSettings, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", instruction_rows(3))

    def damaged(name: str, end: str) -> str:
        prefix = tmp_path / name
        run([path], prefix, EncodeSettings(hf, "instruction"))
        victim = Path(str(prefix) + end)
        victim.write_bytes(victim.read_bytes()[:-3])
        return str(prefix)

    for end, message in [
        (".bin", r"bytes, but its index needs"),
        (".idx", r"idx cannot be read"),
        ("_loss_mask.bin", r"_loss_mask.bin has .* bytes"),
        (".prepared.json", r"does not describe a prepared set"),
    ]:
        with pytest.raises(ValueError, match=message):
            open_set(damaged(end.replace(".", "-"), end))
    prefix = damaged("swapped", ".prepared.json")
    os.remove(prefix + ".prepared.json")
    with pytest.raises(ValueError, match=r"swapped.prepared.json is missing beside a loss mask"):
        open_set(prefix)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"documents": "3"}, "\"documents\" is '3', which is of the wrong kind"),
        ({"largest_token_id": None}, '"largest_token_id" is None'),
        ({"kind": "picture"}, "\"kind\" is 'picture'"),
        ({"tokenizer": 3}, '"tokenizer" is not a JSON object'),
        ({"tokenizer": {}}, '"library" is missing'),
        ({"version": 9}, "not megatron_fdd.data version 2"),
    ],
)
def test_a_description_of_the_wrong_kind_is_named(
    changes: dict[str, object], message: str, hf: TokenizerSettings, tmp_path: Path
) -> None:
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": "the river"}])
    run([text], tmp_path / "out", EncodeSettings(hf, "jsonl"))
    path = tmp_path / "out.prepared.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=rf"out.prepared.json does not describe a prepared set \({message}"):
        open_set(str(tmp_path / "out"))


@pytest.mark.parametrize("content", ["[]", "3", "", "{", '{"a": ' * 100_000])
def test_a_description_that_is_none_is_named(content: str, hf: TokenizerSettings, tmp_path: Path) -> None:
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": "the river"}])
    run([text], tmp_path / "out", EncodeSettings(hf, "jsonl"))
    (tmp_path / "out.prepared.json").write_text(content)
    with pytest.raises(ValueError, match=r"out.prepared.json does not describe a prepared set \("):
        open_set(str(tmp_path / "out"))


def command(
    hf: TokenizerSettings, source: Path, prefix: Path, *more: str, python: str = sys.executable
) -> list[str]:
    tokenizer = ["--tokenizer-type", hf.tokenizer_type, "--tokenizer-model", hf.tokenizer_model]
    return [
        python,
        str(TOOL),
        "--input",
        str(source),
        "--output-prefix",
        str(prefix),
        *tokenizer,
        *more,
    ]


@pytest.mark.tier("default")
def test_the_tool_with_workers_writes_the_same_bytes(hf: TokenizerSettings, tmp_path: Path) -> None:
    """Documents of several batches are dealt to two sets: by two processes of the tool, and by this process."""
    rows = [{"text": f"{number} {text}", "unread": "x" * 5700} for number, text in enumerate(sentences(1500))]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    assert workers.useful_workers(2, [source]) == 2
    flags = ["--split", "2,1", "--workers", "2"]
    python = forked_python.python()
    done = subprocess.run(
        command(hf, tmp_path / "a.jsonl", tmp_path / "2" / "out", *flags, python=python),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "out_valid: 1,500 documents" in done.stdout
    assert done.stderr == ""
    prefix = tmp_path / "1" / "out"
    run([source], prefix, EncodeSettings(hf, "jsonl"), split=(2.0, 1.0))
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert [len(documents_of(f"{prefix}_{part}")) for part in ("train", "valid")] == [1000, 500]


@pytest.mark.tier("all")
def test_killed_in_the_middle_leaves_nothing_whole(hf: TokenizerSettings, tmp_path: Path) -> None:
    """The input is a pipe that never ends, so the tool is still writing when it is killed."""
    os.mkfifo(tmp_path / "a.jsonl")
    sets = tmp_path / "sets"
    tool = subprocess.Popen(
        command(hf, tmp_path / "a.jsonl", sets / "out", "--format", "jsonl"), stderr=subprocess.PIPE
    )
    try:
        with open(tmp_path / "a.jsonl", "wb") as pipe:
            pipe.write(b'{"text": "the river"}\n' * 400_000)  # more than is read to tell a format
            pipe.flush()
            deadline = time.monotonic() + 120
            while not any(path.stat().st_size for path in sets.glob(".out.partial/part-*/out.bin")):
                assert time.monotonic() < deadline
                assert tool.poll() is None
                time.sleep(0.02)
            tool.send_signal(signal.SIGKILL)
            tool.wait()
    finally:
        tool.kill()
        tool.communicate()
    assert [path for path in sets.iterdir() if not path.name.startswith(".")] == []
    good = write_jsonl(tmp_path / "good.jsonl", [{"text": "the river"}])
    run([good], sets / "out", EncodeSettings(hf, "jsonl"))
    assert np.array_equal(open_set(str(sets / "out")).document_lengths, [len(documents_of(sets / "out")[0])])
