"""Three tiers of tests: what one runs after each edit, what proves the product right, and everything.

A test is in tier `fast` unless its folder or a mark says otherwise:

    pytestmark = pytest.mark.tier("default")      # above the tests of a file, or as a decorator

`fast` is for tests that need only this process and about a second: a test in it that starts live ranks, or another
program by `subprocess`, fails and says where it belongs. `default` proves the product right; `all` adds whole scripts,
models at size, kills. `pytest --tier fast` runs one tier and those before it; without the flag all tests run. A folder
beyond the chosen tier is not even imported, whatever the marks in it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

TIERS = ("fast", "default", "all")
FOLDERS = {"entry": "default", "transformer_engine": "default", "gpu": "all", "scripts": "all"}
ROOT = Path(__file__).parents[1]
# Work is handed out file by file: long files come first, or one core waits for them at the end.
LONGEST = (
    "scripts",
    "convert/test_at_size",
    "entry/test_transformer_engine",
    "step/test_layouts",
    "entry",
    "transformer_engine",
)
# The test that runs in this process, and its tier.
_running: list[str] = ["", "all"]


def tier_of(item: pytest.Item) -> str:
    """Return the tier of a test: that of its nearest mark, or of its folder."""
    mark = item.get_closest_marker("tier")
    if mark is None:
        return tier_of_folder(item.path)
    if len(mark.args) != 1 or mark.args[0] not in TIERS or mark.kwargs:
        raise pytest.UsageError(f'{item.nodeid}: its tier is one of {", ".join(TIERS)}: tier("default")')
    return mark.args[0]


def tier_of_folder(path: Path) -> str:
    """Return the tier of the tests in a folder that have no mark."""
    return FOLDERS.get(path.relative_to(ROOT).parts[0], "fast") if path.is_relative_to(ROOT) else "fast"


def is_beyond(tier: str, chosen: str) -> bool:
    """Whether a test of `tier` is left out when `chosen` is requested."""
    return TIERS.index(tier) > TIERS.index(chosen)


def place(path: Path) -> int:
    """Return when a file's turn comes: its place in `LONGEST`, or a place after all of them."""
    name = path.relative_to(ROOT).as_posix()
    return next((place for place, start in enumerate(LONGEST) if name.startswith(start)), len(LONGEST))


def begin(item: pytest.Item) -> None:
    """Remember which test runs from now on."""
    _running[:] = item.nodeid, tier_of(item)


def refuse_in_fast(what: str) -> None:
    """Fail a test of tier `fast` that does more than its tier allows."""
    name, tier = _running
    if tier == "fast":
        pytest.fail(
            f'{name} starts {what}: mark it `@pytest.mark.tier("default")`, or its file '
            '`pytestmark = pytest.mark.tier("default")` (tests/harness/tiers.py)'
        )


def _is_ours(frame: FrameType | None) -> bool:
    """Whether code of this project has called `subprocess`."""
    while frame is not None and frame.f_globals.get("__name__") == "subprocess":
        frame = frame.f_back
    path = frame.f_code.co_filename if frame is not None else ""
    return path.startswith(str(ROOT.parent)) and "site-packages" not in path


def watch_programs() -> None:
    """Make a test of tier `fast` fail from now on if it starts a program, by itself or in this project's code.

    Programs that a library starts when it is first imported do not count.
    """

    def hook(event: str, _arguments: tuple[Any, ...]) -> None:
        if event == "subprocess.Popen" and _is_ours(sys._getframe(1)):
            refuse_in_fast("a program")

    sys.addaudithook(hook)
