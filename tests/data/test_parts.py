"""A preparation that is cut off and continues after its last whole part, with the same result."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_fdd.data import parts as parts_module
from megatron_fdd.data import prepare as prepare_module
from megatron_fdd.data import workers
from megatron_fdd.data.encode import EncodeSettings
from megatron_fdd.data.parts import Parts, kept_documents
from megatron_fdd.data.prepare import PrepareSettings, prepare
from megatron_fdd.data.prepared import open_set
from megatron_fdd.data.tokenizer import TokenizerSettings
from tests.data.conftest import sentences, write_jsonl


class _Killed(Exception):  # noqa: N818
    """The error that stands for a signal."""


@pytest.fixture(autouse=True)
def a_part_for_each_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts_module, "PART_SECONDS", -1.0)
    monkeypatch.setattr(workers, "_BATCH_DOCUMENTS", 1)


@pytest.fixture
def settings(hf: TokenizerSettings, tmp_path: Path) -> PrepareSettings:
    """Return settings for twelve conversations and pairs, some of them refused, dealt to two sets."""
    rows: list[dict[str, Any]] = [
        {"prompt": ask + " ", "response": say}
        for ask, say in zip(sentences(9, 1), sentences(9, 2), strict=True)
    ]
    rows.insert(2, {"messages": [{"role": "user", "content": "the river"}]})
    rows.insert(7, {"prompt": 1, "response": "x"})
    rows.append({"messages": [{"role": "user", "content": "sing"}, {"role": "assistant", "content": "play"}]})
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    encode = EncodeSettings(hf, "instruction")
    (tmp_path / "sets").mkdir()
    return PrepareSettings(
        (source,), str(tmp_path / "sets" / "out"), encode, split=(2.0, 1.0), skip_refused=True
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def kill_after(number: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """End a run when it has read so many documents; return the list of those that it encodes."""
    seen: list[int] = []

    def documents(*arguments: Any) -> Iterator[Any]:
        for count, document in enumerate(original(*arguments)):
            if count == number:
                raise _Killed
            seen.append(document.number)
            yield document

    original = prepare_module.read_documents
    monkeypatch.setattr(prepare_module, "read_documents", documents)
    return seen


def test_the_room_is_that_before_anything_is_removed(
    settings: PrepareSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def usage(_path: Path) -> Any:
        return SimpleNamespace(free=0 if any((tmp_path / "sets").iterdir()) else 5 << 20)

    monkeypatch.setattr(prepare_module, "_write_all", fail)
    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(
        ValueError, match=r"^--output-prefix .*: No space left on device \(0 MiB free there\)"
    ):
        prepare(settings)
    assert not any((tmp_path / "sets").iterdir())


@pytest.mark.tier("default")
def test_killed_anywhere_it_goes_on_with_the_same_result(
    settings: PrepareSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare(settings)
    wanted = contents(tmp_path / "sets")
    assert whole.tally.refused.total() == 2
    with monkeypatch.context() as patch:
        patch.setattr(parts_module, "PART_SECONDS", 1e9)
        other = dataclasses.replace(settings, output_prefix=str(tmp_path / "one-part" / "out"))
        prepare(other)
        assert contents(tmp_path / "one-part") == wanted
    for number in (0, 1, 5, 11):
        shutil.rmtree(tmp_path / "sets")
        (tmp_path / "sets").mkdir()
        with monkeypatch.context() as patch:
            kill_after(number, patch)
            with pytest.raises(_Killed):
                prepare(settings)
        kept = kept_documents(settings.output_prefix)
        assert kept == number
        assert [path.name for path in (tmp_path / "sets").glob("out*")] == []
        summary = prepare(settings)
        assert summary.tally.state() == whole.tally.state()
        assert contents(tmp_path / "sets") == wanted


@pytest.mark.parametrize("renames", [0, 3, 9])
def test_killed_while_parts_are_joined_or_moved(
    settings: PrepareSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    prepare(settings)
    wanted = contents(tmp_path / "sets")
    with monkeypatch.context() as patch:
        if renames:
            calls = iter(range(renames))
            replace = parts_module.os.replace

            def stopping(source: str, target: str) -> None:
                if next(calls, None) is None:
                    raise _Killed
                replace(source, target)

            patch.setattr(parts_module.os, "replace", stopping)
        else:
            patch.setattr(Parts, "_joined", lambda self: (_ for _ in ()).throw(_Killed))
        with pytest.raises(_Killed):
            prepare(dataclasses.replace(settings, overwrite=True))
    assert kept_documents(settings.output_prefix) > 0
    prepare(dataclasses.replace(settings, overwrite=True))
    assert contents(tmp_path / "sets") == wanted


def test_what_decides_the_sets_begins_anew(
    settings: PrepareSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        kill_after(6, patch)
        with pytest.raises(_Killed):
            prepare(settings)
    other = dataclasses.replace(settings, encode=dataclasses.replace(settings.encode, seq_length=30))
    seen = _recorded(other, monkeypatch)
    assert seen[0] == 1
    assert open_set(settings.output_prefix + "_train").info.preparation["seq_length"] == 30


def test_a_mended_flag_goes_on(settings: PrepareSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="line 3: no message of the assistant"):
        prepare(dataclasses.replace(settings, skip_refused=False))
    assert kept_documents(settings.output_prefix) == 2
    assert _recorded(settings, monkeypatch)[0] == 3


def _recorded(settings: PrepareSettings, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the lines that are encoded."""
    lines: list[int] = []
    call = prepare_module.Encoder.__call__

    def recording(self: Any, document: Any) -> Any:
        lines.append(document.number)
        return call(self, document)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module.Encoder, "__call__", recording)
        prepare(settings)
    return lines


def test_two_runs_do_not_write_to_one_prefix(settings: PrepareSettings) -> None:
    stamp: Any = None
    with (
        Parts(settings.prefixes(), "out", "text", _stamp(), None),
        pytest.raises(ValueError, match="another fdd prepare writes there"),
    ):
        Parts(settings.prefixes(), "out", "text", stamp, None)


def _stamp() -> Any:
    class Stamp:
        largest_id = 10

    return Stamp()


def test_damaged_progress_begins_anew(settings: PrepareSettings, tmp_path: Path) -> None:
    folder = tmp_path / "sets" / ".out.partial"
    folder.mkdir()
    for text in ("", "[]", "{", json.dumps({"fingerprint": None, "documents": "x"})):
        (folder / "progress.json").write_text(text)
        assert kept_documents(settings.output_prefix) == 0
        prepare(dataclasses.replace(settings, overwrite=True))
        assert not folder.exists()
        folder.mkdir()
