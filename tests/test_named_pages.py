"""Every page that a docstring or a comment names is in the repository."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

from tests.harness.markdown import ROOT

FOLDERS = ("megatron_fdd", "tools", "benchmarks", "tests")
# Pages that programs write.
WRITTEN = {"report.md", "results.md"}
_PAGE = re.compile(r"[\w./-]*\w\.md\b")


def test_named_pages_exist() -> None:
    named = {(page, path) for path in sources() for text in said(path) for page in _PAGE.findall(text)}
    assert len(named) > 20
    missing = sorted((page, str(path.relative_to(ROOT))) for page, path in named if not is_there(page))
    assert missing == []


def test_what_names_a_page() -> None:
    source = '"""See docs/none.md."""\nTEXT = "other.md"  # as a-page.md says\ndef f():\n    "Of root.md"\n'
    assert [_PAGE.findall(text) for text in python_remarks(source)] == [
        ["a-page.md"],
        ["docs/none.md"],
        ["root.md"],
    ]


def is_there(page: str) -> bool:
    """Whether a page lies where its name says, from the root or from docs/, or is written by a program."""
    return page in WRITTEN or any((folder / page).is_file() for folder in (ROOT, ROOT / "docs"))


def sources() -> Iterator[Path]:
    for folder in FOLDERS:
        yield from (path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".sh"))


def said(path: Path) -> list[str]:
    """The comments and docstrings of a file."""
    text = path.read_text(encoding="utf-8")
    return python_remarks(text) if path.suffix == ".py" else re.findall(r"(?:^|\s)#.*", text)


def python_remarks(text: str) -> list[str]:
    """The comments of a Python source, then its docstrings."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
    return comments + [words for node in nodes if (words := ast.get_docstring(node)) is not None]
