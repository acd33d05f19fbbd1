"""Imports point downwards only, and one module alone reads Megatron's parallel state."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "megatron_fdd"
# What may import what: a module imports from its own room or from lower levels.
LEVELS = {
    "config": 0, "ops": 0, "patches": 0, "experts": 0, "console": 0, "quiet": 0, "json_file": 0, "disk": 0,
    "launch": 1, "tokenizer_identity": 1, "progress": 1, "wheel": 1, "stepped_adam": 1, "local_norms": 1,
    "parameters": 1, "layer_plan": 1, "balance": 1, "topology": 1, "checkpoint": 1, "attach": 1, "saving": 2,
    "save_folder": 2,
    "fp8": 2, "lens": 2, "losses": 2, "arguments": 2, "rehearsal": 2, "carry": 3, "convert": 3, "lens_copies": 3,
    "live_lens": 3, "sampling": 3, "data": 3, "taps": 4, "evaluate": 4, "teacher": 5, "objective": 6, "preflight": 6,
    "student_memory": 6, "metrics": 7, "dry_run": 7, "student": 8, "pipeline": 8, "run": 8, "schedule": 9,
    "distill": 10, "doctor": 11, "cli": 12, "__main__": 13,
}  # fmt: skip


def modules() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]


def room(name: str) -> str:
    """`megatron_fdd.ops.delta` and a path below the package alike."""
    return name.split(".")[1]


@cache
def imports(path: Path) -> tuple[str, ...]:
    return tuple(_imports(path))


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_imports_point_downwards() -> None:
    assert len(modules()) > 100
    violations = []
    for path in modules():
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for name in imports(path):
            if name.startswith("megatron_fdd.") and room(name) != own and LEVELS[room(name)] >= LEVELS[own]:
                violations.append(f"{path.relative_to(PACKAGE)} (level {LEVELS[own]}) imports {name}")
    assert violations == []


def test_one_module_reads_parallel_state() -> None:
    readers = {
        str(path.relative_to(PACKAGE))
        for path in modules()
        if any(name.startswith("megatron.core.parallel_state") for name in imports(path))
    }
    # A conversion makes its own groups where no run has made any.
    assert readers == {"topology.py", "convert/ranks.py"}


def test_accelerators_are_megatrons_business() -> None:
    """apex and TransformerEngine are used by Megatron where they are installed; nothing of ours needs them."""
    for path in modules():
        top = {name.split(".")[0] for name in imports(path)}
        assert not top & {"apex", "amp_C", "transformer_engine", "transformer_engine_torch"}, path


def test_no_utils() -> None:
    assert not list(PACKAGE.rglob("util*.py"))


def test_no_test_file_imports_another() -> None:
    """So that each can be moved to another tier, or deleted, by itself."""
    files = list(TESTS.rglob("*.py"))
    assert len(files) > 100
    found = [
        f"{path.relative_to(TESTS)} imports {name}"
        for path in files
        for name in imports(path)
        if any(
            part.startswith("test_") and (TESTS.parent / module_file(name, part)).exists()
            for part in name.split(".")
        )
    ]
    assert found == []


def module_file(name: str, part: str) -> str:
    """Path of the module in a dotted name that ends with `part`."""
    parts = name.split(".")
    return "/".join(parts[: parts.index(part) + 1]) + ".py"
