"""A store has one identity: made once, joined by what is equal, and every difference said by its name."""

from __future__ import annotations

import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_fdd.data.store.identity import (
    STORE_FILE,
    StoreIdentity,
    check_same,
    read_identity,
    write_identity,
)
from megatron_fdd.data.store.whole_file import give_name
from tests.data.store.made import IDENTITY

DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "engine": ({"engine": "transformers"}, "engine megatron there, and transformers here"),
    "weights": ({"weights": "99"}, "the weights of a teacher there, and of a teacher here"),
    "final_norm": ({"final_norm": "99"}, "the final norm of a teacher there"),
    "architecture": ({"architecture": "99"}, "the architecture of a teacher there"),
    "num_layers": ({"num_layers": 4, "blocks": [2, 4]}, "num_layers 6 there, and 4 here"),
    "hidden_size": ({"hidden_size": 6}, "hidden_size 5 there, and 6 here"),
    "vocab_size": ({"vocab_size": 9}, "vocab_size 2050 there, and 9 here"),
    "blocks": ({"blocks": [2, 6]}, r"blocks \[2, 4, 6\] there, and \[2, 6\] here"),
    "form": ({"form": "fp8"}, "form bf16 there, and fp8 here"),
    "token_bytes": ({"token_bytes": 9}, "token_bytes 10 there, and 9 here"),
    "ran": (
        {"ran": {**IDENTITY.ran, "dtype": "float32"}},
        "dtype bfloat16 there, and float32 here",
    ),
}


def test_a_second_producer_joins(tmp_path: Path) -> None:
    write_identity(tmp_path / "s", IDENTITY)
    before = (tmp_path / "s" / STORE_FILE).stat()
    write_identity(tmp_path / "s", replace(IDENTITY, teacher="the same one in another folder"))
    assert (tmp_path / "s" / STORE_FILE).stat() == before
    assert read_identity(tmp_path / "s", "--store") == IDENTITY
    assert [path.name for path in (tmp_path / "s").iterdir()] == [STORE_FILE]


@pytest.mark.parametrize("name", [field.name for field in fields(StoreIdentity) if field.name != "teacher"])
def test_every_difference_is_refused_by_name(tmp_path: Path, name: str) -> None:
    changed, message = DIFFERENT[name]
    other = replace(IDENTITY, **changed)
    assert other.digest != IDENTITY.digest
    write_identity(tmp_path, IDENTITY)
    with pytest.raises(ValueError, match=f"^--store {tmp_path}: holds .*{message}. .*give another folder$"):
        write_identity(tmp_path, other)
    assert read_identity(tmp_path, "--store") == IDENTITY


def test_how_it_ran_differs_by_what_only_one_says(tmp_path: Path) -> None:
    write_identity(tmp_path, IDENTITY)
    with pytest.raises(ValueError, match="fp8 None there, and e4m3 here"):
        write_identity(tmp_path, replace(IDENTITY, ran={**IDENTITY.ran, "fp8": "e4m3"}))


def test_the_digest_of_an_identity_is_frozen() -> None:
    """Another one would make every store that there is foreign to itself."""
    assert IDENTITY.digest == replace(IDENTITY, teacher="").digest == "27d3705f38c72f65"


def test_where_no_store_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--flag .*x: there is no such folder .*make one with fdd teach"):
        read_identity(tmp_path / "x", "--flag")
    with pytest.raises(ValueError, match=r"the folder holds no store .*make one with fdd teach"):
        read_identity(tmp_path, "--flag")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"^--store .*file: .*give another place"):
        write_identity(tmp_path / "file", IDENTITY)


FOREIGN: dict[str, tuple[dict[str, Any], str]] = {
    "newer": (
        {"version": 2},
        "has the format version 2, and this version of the package reads 1; give another",
    ),
    "of another kind": ({"format": "zarr"}, "is not of a store of features; give another folder"),
    "unknown field": ({"salt": "1"}, '"salt" is not known'),
    "wrong type": ({"hidden_size": "5"}, "\"hidden_size\" is '5', which is of the wrong kind"),
    "unknown form": ({"form": "int4"}, "\"form\" is 'int4', which is of the wrong kind"),
    "blocks do not increase": ({"blocks": [4, 2, 6]}, "must increase, and end with the last block, 6"),
    "without the last block": ({"blocks": [2, 4]}, "must increase, and end with the last block, 6"),
    "no blocks": ({"blocks": []}, "must increase"),
    "block 0": ({"blocks": [0, 6]}, "must increase"),
    "no width": ({"hidden_size": 0}, "hidden_size 0 must be at least 1"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_of_other_content_is_refused(tmp_path: Path, name: str) -> None:
    changed, message = FOREIGN[name]
    write_identity(tmp_path, IDENTITY)
    path = tmp_path / STORE_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(ValueError, match=message) as caught:
        read_identity(tmp_path, "--flag")
    assert str(caught.value).startswith(f"--flag {tmp_path}: ")


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 300, b"[]", b'{"format": "fdd-fea', b"\xff\xfe", b"[" * 99999]
)
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / STORE_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=STORE_FILE) as caught:
        read_identity(tmp_path, "--flag")
    assert "\n" not in str(caught.value)


def test_a_producer_that_looked_before_the_other_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both find no store; the second one's file must not replace the first one's."""
    write_identity(tmp_path, IDENTITY)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", lambda _: False)
        write_identity(tmp_path, IDENTITY)
        with pytest.raises(ValueError, match="form bf16 there, and int8 here"):
            write_identity(tmp_path, replace(IDENTITY, form="int8"))
    assert read_identity(tmp_path, "--store") == IDENTITY
    assert [path.name for path in tmp_path.iterdir()] == [STORE_FILE]


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """One of several producers that begin together makes the store; others join it or are refused."""

    def refuse(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    identities = [IDENTITY, replace(IDENTITY, form="int8"), IDENTITY, replace(IDENTITY, form="fp8")]

    def make(number: int) -> str | None:
        try:
            write_identity(tmp_path, identities[number])
        except ValueError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(4) as threads:
        refused = list(threads.map(make, range(4)))
    made = read_identity(tmp_path, "--store")
    for identity, message in zip(identities, refused, strict=True):
        assert (message is None) == (identity == made)
        assert message is None or "holds the features of something else: form " in message
    assert [path.name for path in tmp_path.iterdir()] == [STORE_FILE]


def test_a_file_that_came_meanwhile_is_not_replaced_without_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(place: Path, path: Path) -> None:
        Path(path).write_text("another producer's")
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "mine").write_text("mine")
    give_name(tmp_path / "mine", tmp_path / "it")
    assert (tmp_path / "it").read_text() == "another producer's"


def test_a_producer_that_was_killed_between_claim_and_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr("megatron_fdd.data.store.whole_file._CLAIM_S", 0.1)
    (tmp_path / f".{STORE_FILE}.claim").mkdir()
    with pytest.raises(
        ValueError, match=r"ended while it made this file: remove the folder .*claim, and start"
    ):
        write_identity(tmp_path, IDENTITY)
    (tmp_path / f".{STORE_FILE}.claim").rmdir()
    write_identity(tmp_path, IDENTITY)


def test_what_nobody_knows_yet_is_not_compared(tmp_path: Path) -> None:
    write_identity(tmp_path, IDENTITY)
    check_same(tmp_path, replace(IDENTITY, vocab_size=9), {"vocab_size"})
    with pytest.raises(ValueError, match="the weights of a teacher there, and of a teacher here"):
        check_same(tmp_path, replace(IDENTITY, vocab_size=9, weights="99"), {"vocab_size"})
