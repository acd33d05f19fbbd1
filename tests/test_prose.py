"""Rules of the prose that a machine can see."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("megatron_fdd", "tests", "docs", "examples", "benchmarks", "tools", "docker")


def files(*endings: str) -> list[Path]:
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in endings]
    return found + [path for path in ROOT.glob("*") if path.suffix in endings]


def test_no_sentence_begins_with_of() -> None:
    found = []
    for path in files(".py", ".md", ".sh"):
        for match in re.finditer(r'(?:[.!?:]\s|"""|#\s|^- )Of\s', text := path.read_text(), re.MULTILINE):
            found.append(f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}")
    assert found == []
