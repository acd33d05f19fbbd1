"""Modules that a command line names with --fdd-plugin: each registers what it adds when it is imported.

A command line alone can name one. What a checkpoint, a file or the environment says is never imported.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import textwrap
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

FLAG = "--fdd-plugin"
# For --help.
WHERE = "installed, on PYTHONPATH, or in the current folder"
# Ends the message about a name that nothing has registered.
REMEDY = f"if a plug-in adds it, name the plug-in's module with {FLAG}"
# In the environment: the current folder is left out for other modules alone.
PLUGINS_HERE = "FDD_PLUGINS_HERE"
_LONGEST_MESSAGE = 300
# What of torch's an import must leave as it is, and how it begins.
_TORCHS: dict[str, object] = {
    "torch's default device": "cpu",
    "torch's default dtype": "torch.float32",
    "torch's grad mode": True,
    "torch's inference mode": False,
}


def named_plugins(words: Sequence[str]) -> list[str]:
    """List the modules that a command line names, in order. `words` are those behind the program.

    Raises:
        ValueError: the flag has no value.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # which reads as Megatron's does
    parser.add_argument(FLAG, action="append", default=[], dest="names")
    parser.error = _refuse  # type: ignore[method-assign]
    names: list[str] = parser.parse_known_args(words)[0].names
    return names


def import_plugins(names: Sequence[str]) -> None:
    """Import modules, with the current folder first on the path, as `python -m` has it, whatever was started.

    Raises:
        ValueError: one is not there, or fails: with its error, and the place.
    """
    here = os.getcwd()
    is_searched = not sys.flags.safe_path or PLUGINS_HERE in os.environ
    if names and is_searched and sys.path[0] not in ("", here):
        sys.path.insert(0, here)
    for name in names:
        _import(name)


def _import(name: str) -> None:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"{FLAG} {name!r}: must be a module's name, such as package.module, and no file's")
    before = _state()
    try:
        importlib.import_module(name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # GeneratorExit, SystemExit, the panic of a library in Rust
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            raise ValueError(
                f"{FLAG} {name}: there is no module {error.name}: install it, add its folder to PYTHONPATH, or start "
                "in that folder"
            ) from error
        message = textwrap.shorten(str(error), _LONGEST_MESSAGE, placeholder=" ...")
        raise ValueError(
            f"{FLAG} {name}: its import fails with {type(error).__name__}: {message}{_place(error)}; "
            f'see the whole error with python -c "import {name}"'
        ) from error
    changed = [what for what, value in _state().items() if value != before[what]]
    if changed:
        raise ValueError(
            f"{FLAG} {name}: its import changes {', '.join(changed)}, by which the whole program goes; leave that to "
            "the functions that it registers, which set it back"
        )


def _state() -> dict[str, object]:
    """Return what an import must leave as it is, for the rest of the program goes by it, each by its name."""
    state: dict[str, object] = {"sys.argv": list(sys.argv), "the current folder (os.chdir)": os.getcwd()}
    torch: Any = sys.modules.get("torch")
    if torch is None:  # what it begins with
        return {**state, **_TORCHS}
    device, dtype = torch.get_default_device().type, str(torch.get_default_dtype())
    own = device, dtype, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return {**state, **dict(zip(_TORCHS, own, strict=True))}


def _place(error: BaseException) -> str:
    """Name the last line in the plug-in's folder on the way to its error, in brackets; "" where there is none."""
    trace = traceback.extract_tb(error.__traceback__)
    lines = [line for line in trace if line.filename not in (__file__, importlib.__file__)]
    lines = [line for line in lines if not line.filename.startswith("<frozen importlib")]
    if not lines or isinstance(error, SyntaxError):  # whose text has the place
        return ""
    folder = Path(lines[0].filename).parent
    last = [line for line in lines if Path(line.filename).is_relative_to(folder)][-1]
    return f" ({last.filename}, line {last.lineno})"


def _refuse(message: str) -> NoReturn:
    raise ValueError(f"{message}: give a module, such as package.module")
