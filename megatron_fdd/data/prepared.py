"""A prepared set on disk: Megatron's indexed format, a loss mask beside it, and what made it.

    P.bin, P.idx                      token ids; `P` is what `--data-path` takes
    P_loss_mask.bin, P_loss_mask.idx  for instructions only: uint8, 1 for each token that is learned
    P.prepared.json                   `SetInfo`: kind, counts, tokenizer, hash of the content

A set is whole exactly when `P.idx` exists: everything is written in a hidden folder beside it (`parts`) and renamed
at the end; the old set's `P.idx` is removed first, and the new one comes last. Sets without `P.prepared.json` are
plain text made by Megatron's own tools.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megatron_fdd.data.encode import Encoded
from megatron_fdd.data.index_file import IndexFile, read_index_file
from megatron_fdd.data.tokenizer_identity import FormerStamp, TokenizerStamp
from megatron_fdd.host.disk import regular_file
from megatron_fdd.host.json_file import read_json, read_record

FORMAT_NAME = "megatron_fdd.data"
FORMAT_VERSION = 2
# Sets of this version can be read: they say less about their tokenizer, and only the largest of their ids.
_FORMER_VERSION = 1
_MASK_SUFFIX = "_loss_mask"
# Not plain `.json`, which may be the name of the raw file.
_INFO_SUFFIX = ".prepared.json"
# The files of a set; with the last one it looks whole.
_ENDS = (".bin", _MASK_SUFFIX + ".bin", _MASK_SUFFIX + ".idx", _INFO_SUFFIX, ".idx")
PREPARE_AGAIN = "prepare the set again with fdd prepare"
SetKind = Literal["text", "instruction"]


@dataclass(frozen=True, slots=True)
class SetInfo:
    """The contents of `P.prepared.json`.

    Attributes:
        learned_tokens: tokens whose loss mask is 1 (for text: all).
        longest_document: in tokens.
        smallest_token_id: 0 for a set of an older version.
        truncated: documents that were cut to the sequence length.
        content_sha256: hash of all ids and masks; tells two sets at the same place apart.
        preparation: counts and settings of the run that made it, for people and for the report; None in a
            part, and in older sets.
    """

    kind: SetKind
    documents: int
    tokens: int
    learned_tokens: int
    longest_document: int
    largest_token_id: int
    truncated: int
    content_sha256: str
    tokenizer: TokenizerStamp | FormerStamp
    smallest_token_id: int = 0
    preparation: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class PreparedSet:
    """A set that was found to be whole.

    Attributes:
        document_lengths: int32 [documents], in tokens; a mapped file.
        dtype: of an id in `P.bin`.
        info: None for a set that was not made by this project.
    """

    prefix: str
    document_lengths: np.ndarray
    dtype: np.dtype
    info: SetInfo | None


def mask_prefix(prefix: str) -> str:
    """Return the prefix of a set's loss mask."""
    return prefix + _MASK_SUFFIX


class SetWriter:
    """Writes one prepared set."""

    def __init__(self, prefix: str, kind: SetKind, tokenizer: TokenizerStamp) -> None:
        self.prefix = prefix
        self._kind = kind
        self._tokenizer = tokenizer
        self._dtype = DType.optimal_dtype(tokenizer.largest_id + 1)
        self._ids = IndexedDatasetBuilder(prefix + ".bin", dtype=self._dtype)
        self._masks = None
        if kind == "instruction":
            self._masks = IndexedDatasetBuilder(mask_prefix(prefix) + ".bin", dtype=np.uint8)
        self._digest = hashlib.sha256()
        self.documents = self.tokens = self.truncated = 0
        self._learned = self._longest = self._largest = 0
        self._smallest = tokenizer.largest_id

    def add(self, encoded: Encoded) -> None:
        """Append one document."""
        count = len(encoded.ids)
        self._largest = max(self._largest, int(encoded.ids.max()))
        self._smallest = min(self._smallest, int(encoded.ids.min()))
        assert self._largest <= np.iinfo(self._dtype).max, f"id {self._largest} in a {self._dtype} set"
        self._ids.add_document(encoded.ids, [count])
        self._digest.update(struct.pack("<q", count) + encoded.ids.tobytes())
        learned = count
        if self._masks is not None:
            assert encoded.loss_mask is not None
            self._masks.add_document(encoded.loss_mask, [count])
            self._digest.update(encoded.loss_mask.tobytes())
            learned = int(encoded.loss_mask.sum())
        self.documents += 1
        self.tokens += count
        self._learned += learned
        self._longest = max(self._longest, count)
        self.truncated += encoded.truncated

    def finish(self, preparation: Mapping[str, Any] | None = None) -> None:
        """Close the files; now the set is whole."""
        if self._masks is not None:
            self._masks.finalize(mask_prefix(self.prefix) + ".idx")
        info = SetInfo(
            kind=self._kind,
            documents=self.documents,
            tokens=self.tokens,
            learned_tokens=self._learned,
            longest_document=self._longest,
            largest_token_id=self._largest,
            truncated=self.truncated,
            content_sha256=self._digest.hexdigest(),
            tokenizer=self._tokenizer,
            smallest_token_id=self._smallest,
            preparation=preparation,
        )
        with open(self.prefix + _INFO_SUFFIX, "w", encoding="utf-8") as file:
            json.dump(
                {"format": FORMAT_NAME, "version": FORMAT_VERSION, **dataclasses.asdict(info)}, file, indent=1
            )
        self._ids.finalize(self.prefix + ".idx")

    def add_set(self, prefix: str) -> None:
        """Append all documents of another set of this kind."""
        info = _read_info(prefix)
        assert info is not None
        if info.documents == 0:  # a file without bytes cannot be mapped
            return
        documents = IndexedDataset(prefix)
        masks = IndexedDataset(mask_prefix(prefix)) if self._masks is not None else None
        for index in range(len(documents)):
            ids = documents[index].astype(np.int32)  # the type in which ids are hashed
            self.add(Encoded(ids, None if masks is None else masks[index]))
        self.truncated += info.truncated


def written_files(prefix: str) -> list[str]:
    """Return the files that a set of this prefix can have."""
    return [prefix + end for end in _ENDS]


def check_replaceable(prefix: str) -> None:
    """Refuse a prefix at which a set would take the place of a link, or of what is no regular file.

    Raises:
        ValueError: names the file.
    """
    for path in filter(os.path.lexists, (prefix + end for end in _ENDS)):
        if os.path.islink(path):
            raise ValueError(
                f"--output-prefix {prefix}: {path} is a symbolic link, which the set would replace; give the prefix of "
                "its target, or remove the link"
            )
        regular_file("--output-prefix", path)


def move_sets(moves: Sequence[tuple[str, str]]) -> None:
    """Move finished sets to their places; each pair is (from, to).

    If the process is killed during it, no half-replaced set looks whole.
    """
    for _, prefix in moves:
        for end in reversed(_ENDS[1:]):
            if os.path.exists(prefix + end):
                os.remove(prefix + end)
    for source, prefix in moves:
        for end in _ENDS:
            if os.path.exists(source + end):
                os.replace(source + end, prefix + end)


def set_kind(prefix: str) -> SetKind:
    """Return the kind of the set at `prefix`. Raises ValueError as `open_set` does."""
    info = _read_info(prefix)
    return "text" if info is None else info.kind


def content_identity(prefix: str) -> str:
    """Return a name for the content of a set; the same on every rank and machine."""
    info = _read_info(prefix)
    if info is not None:
        return info.content_sha256
    return "-".join(str(os.path.getsize(prefix + end)) for end in (".bin", ".idx"))


def open_set(prefix: str) -> PreparedSet:
    """Read the index of a prepared set and refuse a set that is not whole. As long as its files stay, it is read once.

    Raises:
        ValueError: files are missing, truncated, or do not belong together; names them and the remedy.
    """
    return _opened(prefix, tuple(_state(prefix + end) for end in _ENDS))


def _state(path: str) -> tuple[int, int, int] | None:
    """Return what changes when a file does; None if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


@lru_cache(maxsize=1024)
def _opened(prefix: str, _states: tuple[tuple[int, int, int] | None, ...]) -> PreparedSet:
    """Open a set, once for each state of its files."""
    info = _read_info(prefix)
    index = _index_of(prefix)
    lengths = index.lengths
    if info is None:
        if os.path.exists(mask_prefix(prefix) + ".idx"):
            raise ValueError(f"{prefix}{_INFO_SUFFIX} is missing beside a loss mask; {PREPARE_AGAIN}")
        return PreparedSet(prefix, lengths, index.dtype, None)
    tokens = int(lengths.sum(dtype=np.int64))
    if (len(lengths), tokens) != (info.documents, info.tokens):
        raise ValueError(
            f"{prefix}{_INFO_SUFFIX} says {info.documents} documents and {info.tokens} tokens, "
            f"{prefix}.idx says {len(lengths)} and {tokens}; {PREPARE_AGAIN}"
        )
    if info.kind == "instruction" and not np.array_equal(_index_of(mask_prefix(prefix)).lengths, lengths):
        raise ValueError(f"{mask_prefix(prefix)}.idx does not belong to {prefix}.idx; {PREPARE_AGAIN}")
    return PreparedSet(prefix, lengths, index.dtype, info)


def _index_of(prefix: str) -> IndexFile:
    """Return the index of one indexed dataset, whose two files must agree."""
    for end in (".bin", ".idx"):
        if not os.path.exists(prefix + end):
            raise ValueError(
                f"data file {prefix + end} does not exist; --data-path takes the prefix that "
                "fdd prepare got as --output-prefix (with _train or _valid after --split)"
            )
        if not os.path.isfile(prefix + end):  # a pipe would be waited for
            raise ValueError(f"{prefix}{end} is no regular file, which a set needs; {PREPARE_AGAIN}")
    try:
        index = read_index_file(prefix + ".idx")
        actual = os.path.getsize(prefix + ".bin")
        if actual == index.bin_bytes:
            index.check_pointers()
    except (ValueError, OSError) as error:
        raise ValueError(f"{prefix}.idx cannot be read ({error}); {PREPARE_AGAIN}") from error
    if actual != index.bin_bytes:
        raise ValueError(
            f"{prefix}.bin has {actual} bytes, but its index needs {index.bin_bytes}: truncated, or of another set; "
            f"{PREPARE_AGAIN}"
        )
    return index


def _read_info(prefix: str) -> SetInfo | None:
    path = prefix + _INFO_SUFFIX
    if not os.path.exists(path):
        return None
    if not os.path.isfile(path):  # a pipe would be waited for
        raise ValueError(f"{path} is no regular file; prepare the set again")
    try:
        values = read_json(Path(path))
        name, version = values.pop("format", None), values.pop("version", None)
        if name != FORMAT_NAME or version not in (FORMAT_VERSION, _FORMER_VERSION):
            raise ValueError(f"not {FORMAT_NAME} version {FORMAT_VERSION}")
        stamp = TokenizerStamp if version == FORMAT_VERSION else FormerStamp
        tokenizer = values.pop("tokenizer", None)
        if not isinstance(tokenizer, dict):
            raise ValueError('"tokenizer" is not a JSON object')
        return read_record(SetInfo, {**values, "tokenizer": read_record(stamp, tokenizer)})
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} does not describe a prepared set ({error}); {PREPARE_AGAIN}") from error
