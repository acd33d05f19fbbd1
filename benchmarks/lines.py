"""Results as lines of JSON, each on the disk as soon as it is known: a run that is cut off keeps its earlier lines.

This file needs only Python, so it works where torch does not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def write(path: Path | None, kind: str, *records: Mapping[str, Any]) -> None:
    """Append records of a kind, in one piece, each on its own line; do nothing without a path."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps({"kind": kind, **record}) + "\n" for record in records)
    with path.open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # the previous line was cut off while it was written
                text = "\n" + text
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def read(path: Path, kind: str | None = None) -> list[Line]:
    """Return every record, or those of a kind; leave out what is not a record, such as a line that was cut off."""
    if not path.exists():
        return []
    found = []
    for text in path.read_bytes().splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # not JSON, or not UTF-8
            continue
        if isinstance(line, dict) and kind in (None, line.get("kind")):
            found.append(line)
    return found
