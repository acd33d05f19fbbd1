"""The identity stored beside a checkpoint's tokenizer, so that a run need not compute it again."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

from megatron_fdd.data.tokenizer_identity.compare import compare
from megatron_fdd.data.tokenizer_identity.identity import TokenizerIdentity, TokenizerStamp
from megatron_fdd.data.tokenizer_identity.sources import VOCABULARY_FILES, has_tokenizer, identity_of_folder
from megatron_fdd.host.json_file import read_json, read_record, write_json

IDENTITY_FILE = "fdd_tokenizer.json"
# The tokenizer's folder inside a checkpoint's folder.
TOKENIZER_FOLDER = "tokenizer"
_VERSION = 2
_FILES = (*VOCABULARY_FILES, "tokenizer_config.json", "added_tokens.json")


def write_stamp(folder: Path, identity: TokenizerIdentity) -> None:
    """Write the identity of the tokenizer that is loaded from a folder into that folder."""
    values = {
        "version": _VERSION,
        "files_sha256": _files_sha256(folder),
        **dataclasses.asdict(identity.stamp),
    }
    write_json(folder / IDENTITY_FILE, values)


def stored_identity(folder: Path) -> TokenizerStamp | TokenizerIdentity | None:
    """Return the identity of the tokenizer in a checkpoint's `tokenizer/`; None where there is none.

    The stamp is used only while the files are those it was made from.

    Raises:
        ValueError: a file cannot be read.
    """
    if not has_tokenizer(folder):
        return None
    files, stamp = _stamp(folder)
    return stamp if stamp is not None and files == _files_sha256(folder) else identity_of_folder(folder)


def check_copy(folder: Path) -> None:
    """Refuse a tokenizer that cannot be read, or is not what it was when its identity was written beside it.

    Raises:
        ValueError: names the folder and the first difference.
    """
    now, (_, stamp) = stored_identity(folder), _stamp(folder)
    if stamp is None or not isinstance(now, TokenizerIdentity):
        return
    difference = compare(stamp, now, ("its stamp", "its files"), with_added_texts=False).difference
    if difference is not None:
        raise ValueError(
            f"{folder} is not the tokenizer that was copied there: {difference}; copy it again, or if it was changed "
            f"on purpose, delete {IDENTITY_FILE} in it"
        )


def _stamp(folder: Path) -> tuple[str | None, TokenizerStamp | None]:
    """Return the hash of the files and the identity that were stored; None where this version stored none.

    Raises:
        ValueError: the file cannot be read.
    """
    path = folder / IDENTITY_FILE
    if not path.is_file():
        return None, None
    values = read_json(path)
    if values.pop("version", None) != _VERSION:
        return None, None
    files = values.pop("files_sha256", None)
    try:
        return files, read_record(TokenizerStamp, values)
    except ValueError as error:
        raise ValueError(f"{path} does not hold the identity of a tokenizer ({error}); delete it") from error


def _files_sha256(folder: Path) -> str:
    """Return a hash of the bytes of all files that decide the identity."""
    total = hashlib.sha256()
    for name in _FILES:
        if (folder / name).is_file():
            total.update(name.encode() + hashlib.sha256((folder / name).read_bytes()).digest())
    return total.hexdigest()
