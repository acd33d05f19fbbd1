"""Pipes that are read: a writer may come late, and none is waited for for ever."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from megatron_fdd.cli.prepare_data import command as prepare
from megatron_fdd.host import pipe
from megatron_fdd.host.pipe import open_to_read


def test_a_pipe_without_a_writer_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe, "_WRITER_S", 0.1)
    path = str(tmp_path / "pipe")
    os.mkfifo(path)
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with pytest.raises(
        ValueError, match=f"^{path} is a pipe, and nothing writes to it, for 0.1 s now; start"
    ):
        open_to_read(path)
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before


def test_a_chat_template_may_be_a_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe, "_WRITER_S", 0.1)
    path = str(tmp_path / "template.jinja")
    os.mkfifo(path)
    words = [
        "a",
        "--tokenizer-type",
        "HuggingFaceTokenizer",
        "--tokenizer-model",
        "x",
        "--output-prefix",
        "y",
    ]
    ended = CliRunner().invoke(prepare, [*words, "--chat-template", path])
    assert ended.exit_code == 2
    assert f"--chat-template': {path} is a pipe, and nothing writes to it" in ended.stderr


def test_a_late_writer_is_waited_for(tmp_path: Path) -> None:
    path = str(tmp_path / "pipe")
    os.mkfifo(path)

    def write() -> None:
        time.sleep(0.05)
        Path(path).write_bytes(b"late")

    writer = threading.Thread(target=write)
    writer.start()
    with open_to_read(path) as file:
        assert file.read() == b"late"
    writer.join()


def test_a_shells_pipe_is_there_at_once() -> None:
    reading, writing = os.pipe()
    os.write(writing, b"text")
    os.close(writing)
    with open_to_read(f"/dev/fd/{reading}") as file:
        assert file.read() == b"text"
    os.close(reading)


def test_a_device_is_refused() -> None:
    with pytest.raises(ValueError, match="^/dev/zero is a device; give a file or a pipe$"):
        open_to_read("/dev/zero")
