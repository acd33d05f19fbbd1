"""Imports point downwards only, and one module alone reads Megatron's parallel state."""

from __future__ import annotations

import ast
import graphlib
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "megatron_fdd"
# What may import what: a module imports from its own room or from lower floors.
FLOORS = (
    ("ops", "host"),
    ("config", "data"),
    ("losses",),
    ("convert", "evaluate", "step"),
    ("plan", "doctor"),
    ("distill", "teach", "cli"),
)
LEVELS = {room: level for level, rooms in enumerate(FLOORS) for room in rooms} | {"__main__": len(FLOORS)}


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
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import, which no test below follows"
            assert node.module is not None
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
            if name == "megatron_fdd.__version__" or not name.startswith("megatron_fdd."):
                continue
            if room(name) != own and LEVELS[room(name)] >= LEVELS[own]:
                violations.append(f"{path.relative_to(PACKAGE)} (level {LEVELS[own]}) imports {name}")
    assert violations == []


def test_no_two_modules_import_each_other() -> None:
    graph = {name_of(path): {own for name in imports(path) if (own := module_of(name))} for path in modules()}
    graphlib.TopologicalSorter({name: ends - {name} for name, ends in graph.items()}).prepare()


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def files() -> dict[str, str]:
    """File name of each module, by its dotted name."""
    return {name_of(path): path.name for path in modules()}


@cache
def module_of(name: str) -> str | None:
    """The module of this package that a dotted name is, or is in; a folder that holds others is none."""
    own = files()
    while name not in own:
        name = name.rpartition(".")[0]
        if not name:
            return None
    return name if own[name] != "__init__.py" else None


def test_losses_and_ops_know_no_megatron() -> None:
    """They can be used in any trainer: torch, and what of this package has no Megatron either."""
    for path in modules():
        own = path.relative_to(PACKAGE).parts[0]
        if own in ("ops", "losses"):
            top = {name.split(".")[0] for name in imports(path)}
            assert top <= {*sys.stdlib_module_names, "torch", "triton", "megatron_fdd"}, path
            assert not re.search(r"import_module\(\"megatron\.", path.read_text()), path
            rooms = {room(name) for name in imports(path) if name.startswith("megatron_fdd.")}
            assert rooms <= ({"ops"} if own == "ops" else {"ops", "losses", "config"}), path
        elif own == "config":
            assert not any(name.startswith("megatron.") for name in imports(path)), path


def test_rooms_are_on_a_floor() -> None:
    rooms = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in modules()}
    assert rooms == LEVELS.keys()
    assert len(FLOORS) <= 6
    assert sum(map(len, FLOORS)) <= 13


def test_one_module_reads_parallel_state() -> None:
    readers = {
        str(path.relative_to(PACKAGE))
        for path in modules()
        if any(name.startswith("megatron.core.parallel_state") for name in imports(path))
    }
    # A conversion makes its own groups where no run has made any.
    assert readers == {"host/topology.py", "convert/ranks.py"}


def test_accelerators_are_megatrons_business() -> None:
    """apex and TransformerEngine are used by Megatron where they are installed; nothing of ours needs them."""
    for path in modules():
        top = {name.split(".")[0] for name in imports(path)}
        assert not top & {"apex", "amp_C", "transformer_engine", "transformer_engine_torch"}, path


MOST_PARAMETERS = 6
# Kernels take pointers and numbers; the other signature is Megatron's.
MORE_PARAMETERS = {
    "ops/gpu/kernels.py": {"fold_row", "read_logits", "softmax_kernel"},
    "ops/gpu/row_kernels.py": {"add_lanes", "statistics_kernel", "second_kernel", "gradient_kernel"},
    "host/patches/adam.py": {"__init__"},
}


def test_functions_have_few_parameters() -> None:
    found: dict[str, set[str]] = {}
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                given = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                if len([each for each in given if each.arg not in ("self", "cls", "ctx")]) > MOST_PARAMETERS:
                    found.setdefault(str(path.relative_to(PACKAGE)), set()).add(node.name)
    assert found == MORE_PARAMETERS


def test_files_and_functions_are_short() -> None:
    for path in modules():
        text = path.read_text()
        assert text.count("\n") < 300, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"


def test_digits_are_those_that_int_reads() -> None:
    """A superscript two is a digit, and no number for `int`."""
    found = [
        str(path.relative_to(PACKAGE))
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("isdigit", "isnumeric")
    ]
    assert found == [], "use isdecimal"


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
