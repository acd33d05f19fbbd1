"""Results as lines of JSON, each on the disk as soon as it is known: a run that is cut off leaves all before it.

Needs Python alone, so that it works where torch does not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def write(path: Path | None, kind: str, *records: Mapping[str, Any]) -> None:
    """Append records of a kind, in one piece; without a path, nothing."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps({"kind": kind, **record}) + "\n" for record in records)
    with path.open("a") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path, kind: str | None = None) -> list[Line]:
    """Every record, or those of a kind. A line that was cut off while it was written is left out."""
    if not path.exists():
        return []
    found = []
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if kind in (None, line.get("kind")):
            found.append(line)
    return found
