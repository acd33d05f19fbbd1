"""The files that list a run's data sets for Megatron (`--data-args-path` and two more): can Megatron read them?

Megatron opens them on every rank without a look: it would wait for a pipe, and end in a KeyError or in wrong text.
"""

from __future__ import annotations

import argparse
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.core.datasets.object_storage_utils import is_object_storage_path

from megatron_fdd.data.sources import data_prefixes
from megatron_fdd.host.disk import regular_file
from megatron_fdd.host.json_file import read_json

_LISTS = ("data_args_path", "per_split_data_args_path", "per_dataset_sequences_path")
_PARTS = ("train", "valid", "test")
# The start of an `.idx`: magic, version, code of the dtype, sequences, documents.
_HEADER = struct.Struct("<9sQBQQ")


def check_list_files(args: argparse.Namespace) -> None:
    """Refuse files of lists that are none, or list no data. Those in object storage are Megatron's to read.

    Raises:
        ValueError: names flag, file and entry.
    """
    for name in _LISTS:
        given, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        if given is None or is_object_storage_path(given):
            continue
        path = regular_file(flag, given)
        if not path.is_file():
            raise ValueError(f"{flag} {given}: there is no such file; give another path")
        if name == "data_args_path":
            _check_words(path, f"{flag} {given}")
        else:
            try:
                content = read_json(path)
            except ValueError as error:
                raise ValueError(f"{flag}: {error}") from error
            (_check_parts if name.startswith("per_split") else _check_lengths)(
                args, f"{flag} {given}", content
            )


def _check_words(path: Path, told: str) -> None:
    """Refuse a text that names no data."""
    try:
        words = path.read_text(encoding="utf-8").split()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{told}: is no text ({error}); write prefixes into it, or weights and prefixes"
        ) from error
    if not words:
        raise ValueError(f"{told}: names no data; write prefixes into it, or weights and prefixes")


def _check_parts(_args: argparse.Namespace, told: str, content: Mapping[str, Any]) -> None:
    """Refuse anything but a list of prefixes, or a text with them, for each part of the data."""
    for part in _PARTS:
        words = content.get(part, 0)
        is_list = isinstance(words, list) and all(isinstance(word, str) for word in words)
        if not (words is None or isinstance(words, str) or is_list):
            raise ValueError(
                f"{told}: needs {', '.join(map(repr, _PARTS))}, each null or a list of prefixes (with weights, as "
                f"texts); {part!r} is {'missing' if part not in content else repr(words)[:60]}"
            )


def _check_lengths(args: argparse.Namespace, told: str, content: Mapping[str, Any]) -> None:
    """Refuse lengths other than those that the sets' own files have: other text would be read, without a word."""
    for prefix in data_prefixes(args):
        path = Path(f"{prefix}.idx")
        if is_object_storage_path(prefix) or not path.is_file():
            continue
        with path.open("rb") as file:
            header = file.read(_HEADER.size)
        found = list(_HEADER.unpack(header)[3:]) if len(header) == _HEADER.size else None
        if found is not None and content.get(prefix) != found:
            raise ValueError(
                f"{told}: has {content.get(prefix)!r:.60} for {prefix}, whose index has {found} (sequences and "
                "documents); make the file again with Megatron's build_sequences_per_dataset.py"
            )
