"""Checks of the installed Megatron against what this package takes from it: names, signatures, patches."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from megatron_fdd.doctor.finding import Finding
from megatron_fdd.doctor.seam_table import SEAMS, Seam
from megatron_fdd.host.patches import table as tables

_MEGATRON = "megatron.core"
_PACKAGE = Path(__file__).parents[1]
_REMEDY = f"install {tables.WRITTEN_FOR}, or adapt"


def imported_names() -> Iterator[Finding]:
    """Check every name that a module of this package imports from Megatron, as read from the sources."""
    importlib.import_module(_MEGATRON)  # one error, not one for each name, if it cannot be imported at all
    users = _users()
    missing = [name for name in sorted(users) if not _exists(name)]
    for name in missing:
        yield Finding("FAIL", name, "not in this Megatron", f"{_REMEDY} {', '.join(users[name])}")
    if not missing:
        yield Finding("ok", "imports from Megatron", f"all {len(users)} names are there")


@cache
def _users() -> dict[str, list[str]]:
    """Return, for each name, our files that import it."""
    users: dict[str, set[str]] = defaultdict(set)
    for source in _PACKAGE.rglob("*.py"):
        for name in names_imported(source):
            users[name].add(str(source.relative_to(_PACKAGE)))
    return {name: sorted(files) for name, files in users.items()}


def names_imported(source: Path) -> Iterator[str]:
    """Yield the names of `megatron.core` and `megatron.training` that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        else:
            continue
        yield from (name for name in found if name.startswith(("megatron.core", "megatron.training")))


def signatures() -> Iterator[Finding]:
    """Check each seam and those of its parameters that are used."""
    importlib.import_module(_MEGATRON)
    for seam in SEAMS:
        yield examined(seam)


def examined(seam: Seam) -> Finding:
    """Check whether the installed Megatron has a seam with all of its parameters; return the finding."""
    remedy = f"{_REMEDY} {', '.join(seam.where)}"
    try:
        found = resolved(seam.name)
    except (ImportError, AttributeError):
        return Finding("FAIL", seam.name, f"not in this Megatron: {seam.breaks}", remedy)
    parameters = inspect.signature(found).parameters
    takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    gone = [] if takes_any else [name for name in seam.parameters if name not in parameters]
    if gone:
        text = f"has no parameter {', '.join(gone)} any more: {seam.breaks}"
        return Finding("FAIL", seam.name, text, remedy)
    return Finding("ok", seam.name, f"({', '.join(seam.parameters)})")


def patches() -> Iterator[Finding]:
    """Check each name that a run replaces, and those of a rehearsal: conversions without a GPU replace them too."""
    importlib.import_module(_MEGATRON)
    for patch in tables.PATCHES + tables.REHEARSAL_PATCHES:
        try:
            tables.current(patch.target)
        except (ImportError, ValueError):
            text = f"not in this Megatron. {patch.why}"
            yield Finding("FAIL", patch.target, text, f"{_REMEDY} {patch.installed_by}")
        else:
            yield Finding("ok", patch.target, f"can be replaced ({patch.when})")


def resolved(name: str) -> Any:
    """Return what a dotted name stands for: a module, a function, a class, or something in a class.

    Raises:
        ImportError, AttributeError: there is no such thing.
    """
    parent, _, last = name.rpartition(".")
    if not parent:
        return importlib.import_module(name)
    try:
        owner = importlib.import_module(parent)
    except ModuleNotFoundError as error:
        if error.name != parent:
            raise
        owner = resolved(parent)
    if inspect.ismodule(owner) and not hasattr(owner, last):
        return importlib.import_module(name)
    return getattr(owner, last)


def _exists(name: str) -> bool:
    try:
        resolved(name)
    except (ImportError, AttributeError):
        return False
    return True
