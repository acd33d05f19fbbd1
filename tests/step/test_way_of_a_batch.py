"""The way of a batch through the package: the files that a reader has to open, and the page that lists them."""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path
from types import FrameType

import pytest

from tests.harness.markdown import ROOT
from tests.harness.ranks import run_on_ranks
from tests.oracle.case import Case, join, schedule_step

PACKAGE = ROOT / "megatron_fdd"
MOST_FILES = 15
# The fused operations; what torch and Megatron call by themselves, here norms of local modules and the rehearsal; and
# records, whose functions give parts of values that were made before the step, or add sums.
NOT_COUNTED = ("ops/", "host/", "config/", "losses/pairs.py", "losses/chunk_loss.py")


def crossed(case: Case) -> list[str]:
    """Return the files of the package of which a step runs a function, in the order of their first call.

    It is the second step: in the first one the teacher is checked.
    """
    chunks, _, steps = join(case)
    schedule_step(case, chunks, steps)
    found: dict[str, None] = {}

    def note(frame: FrameType, event: str, _: object) -> None:
        path = _own_file(frame.f_code.co_filename)
        if event == "call" and path is not None:
            found.setdefault(path)

    sys.setprofile(note)
    try:
        schedule_step(case, chunks, steps)
    finally:
        sys.setprofile(None)
    return [path for path in found if not path.startswith(NOT_COUNTED)]


@cache
def _own_file(name: str) -> str | None:
    path = Path(name)
    return path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else None


@pytest.mark.tier("default")
def test_one_batch_crosses_few_files_and_the_page_lists_them() -> None:
    """A file is crossed if one of its functions runs between Megatron's call of the schedule and its return.

    The backward pass is in it. There is one pipeline stage, and the terms are the default ones. `NOT_COUNTED` has what
    is no hop of a reader.
    """
    (files,) = run_on_ranks(crossed, Case().layout, {"case": Case()})
    assert len(files) <= MOST_FILES, files
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    assert files == re.findall(r"^\| \d+ \| `([\w/.]+)` \|", page, re.MULTILINE), files
