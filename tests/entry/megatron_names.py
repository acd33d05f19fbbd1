"""The objects behind all names of Megatron (and of two modules of torch), and the names that a run has replaced."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from types import ModuleType
from typing import Any
from unittest.mock import patch

from megatron_fdd.host.patches.table import PATCHES, REHEARSAL_PATCHES
from tests.entry.command import Ending, run_commands

_BEFORE: dict[str, Any] = {}
_MISSING = object()
# The modules of torch in which a run replaces a name.
_TORCHS = ("torch._weights_only_unpickler", "torch.distributed.checkpoint.filesystem")


def remember() -> None:
    """Remember the present objects, with which `replaced` compares."""
    _BEFORE.update(_names())


def replaced() -> set[str]:
    """Return names whose object has changed since then, without Megatron's own state and the tests' changes."""
    now = _names()
    changed = {name for name, value in _BEFORE.items() if now.get(name, _MISSING) is not value}
    # A name that was loaded later, or before a rank remembered anything, is Megatron's own, unless it is ours.
    changed |= {
        name for name, value in now.items() if _is_from(value, "megatron_fdd") and not _is_torchs(value)
    }
    changed -= _own_state() - {patch.target for patch in PATCHES + REHEARSAL_PATCHES}
    changed = {name for name in changed if not _is_from(now.get(name), "tests")}
    # With a class, its members are others too.
    return {name for name in changed if name.rpartition(".")[0] not in changed}


def replaced_in_a_run(
    command: Sequence[str], environment: dict[str, str]
) -> tuple[Ending, set[str], set[str]]:
    """Return, on one rank, the entry point's ending, and the names that are replaced during and after training."""
    from megatron_fdd.step.schedule import StepHooks

    if not _BEFORE:
        remember()
    run, found = StepHooks.run, set[str]()

    def watched(*arguments: Any, **keywords: Any) -> Any:
        found.update(replaced())
        return run(*arguments, **keywords)

    with patch.object(StepHooks, "run", watched):
        [ending] = run_commands([command], environment=environment)
    return ending, found, replaced()


def _names() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for module in _modules():
        for name, value in vars(module).items():
            found[f"{module.__name__}.{name}"] = value
            if inspect.isclass(value) and value.__module__ == module.__name__:
                found |= {f"{module.__name__}.{name}.{key}": each for key, each in vars(value).items()}
    return found


def _modules() -> Iterator[ModuleType]:
    for name, module in list(sys.modules.items()):
        is_watched = name.startswith("megatron.") or name in _TORCHS
        if is_watched and isinstance(module, ModuleType):
            yield module


def _is_from(value: Any, package: str) -> bool:
    return str(getattr(value, "__module__", "")).split(".")[0] == package


def _is_torchs(value: Any) -> bool:
    """Whether Megatron found the object in torch, where a rehearsal had put it."""
    module = str(getattr(value, "__module__", ""))
    return module in ("megatron_fdd.host.rehearsal.device", "megatron_fdd.host.rehearsal.switch")


def _own_state() -> set[str]:
    """Return the names that Megatron's functions assign to with a `global` statement."""
    found: set[str] = set()
    for module in _modules():
        with suppress(OSError, TypeError):
            tree = ast.parse(inspect.getsource(module))
            names = {each for node in ast.walk(tree) if isinstance(node, ast.Global) for each in node.names}
            found |= {f"{module.__name__}.{name}" for name in names}
    return found
