"""Files that list data sets for Megatron: what Megatron would wait for, or misread, is refused in one line."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_fdd.data.list_files import check_list_files
from tests.data.conftest import megatron_args

FLAGS = ("--data-args-path", "--per-split-data-args-path", "--per-dataset-sequences-path")


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize(
    ("put", "said"),
    [
        (os.mkfifo, "is a pipe"),
        (Path.mkdir, "is a folder"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device"),
        (lambda path: None, "there is no such file"),
    ],
)
def test_what_is_no_file(put: Callable[[Path], object], said: str, flag: str, tmp_path: Path) -> None:
    put(tmp_path / "list")
    with pytest.raises(ValueError, match=f"^{flag} {tmp_path / 'list'}: {said}"):
        check_list_files(megatron_args(flag, str(tmp_path / "list")))


@pytest.mark.parametrize(
    ("flag", "text", "said"),
    [
        (FLAGS[0], " \n", "names no data"),
        (FLAGS[0], b"\xff", "is no text"),
        (FLAGS[1], "{", "is not valid JSON"),
        (FLAGS[1], "[]", "must hold a JSON object"),
        (FLAGS[1], '{"train": null, "valid": null}', "'test' is missing"),
        (FLAGS[1], '{"train": [1], "valid": null, "test": null}', "'train' is [1]"),
        (FLAGS[1], '{"train": {}, "valid": null, "test": null}', "'train' is {}"),
        (FLAGS[2], "{" * 99999, "is not valid JSON"),
        (FLAGS[2], "{}", "has None for"),
    ],
)
def test_what_lists_nothing(flag: str, text: str | bytes, said: str, sets: Path, tmp_path: Path) -> None:
    (tmp_path / "list").write_bytes(text if isinstance(text, bytes) else text.encode())
    data = () if flag != FLAGS[2] else ("--data-path", str(sets / "text"))
    with pytest.raises(ValueError, match=f"^{flag}.*{re.escape(said)}"):
        check_list_files(megatron_args(*data, flag, str(tmp_path / "list")))


def test_lengths_of_another_set(sets: Path, tmp_path: Path) -> None:
    prefix = str(sets / "text")
    args = megatron_args("--data-path", prefix, FLAGS[2], str(tmp_path / "list"))
    (tmp_path / "list").write_text(json.dumps({prefix: [1, 2]}))
    with pytest.raises(ValueError, match=r"has \[1, 2\] for .*, whose index has \[\d+, \d+\]") as error:
        check_list_files(args)
    found = re.search(r"index has (\[\d+, \d+\])", str(error.value))
    assert found is not None
    (tmp_path / "list").write_text(f'{{"{prefix}": {found[1]}}}')
    check_list_files(args)
    (tmp_path / "words").write_text(prefix)
    (tmp_path / "parts").write_text(json.dumps({"train": [prefix], "valid": prefix, "test": None}))
    check_list_files(megatron_args(FLAGS[0], str(tmp_path / "words")))
    check_list_files(megatron_args(FLAGS[1], str(tmp_path / "parts")))
