"""The generated tables of docs/megatron.md."""

from __future__ import annotations

import re

from megatron_fdd.doctor.seam_table import SEAMS
from megatron_fdd.patches import PATCHES, REHEARSAL_PATCHES, Patch


def seams() -> str:
    """A row for each seam that `fdd doctor` looks at."""
    rows = [
        (
            f"`{_short(seam.name)}` ({', '.join(f'`{name}`' for name in seam.parameters) or 'none'})",
            seam.purpose,
            ", ".join(f"`{path}`" for path in seam.where),
            seam.breaks,
        )
        for seam in SEAMS
    ]
    return _table(("seam", "what for", "where", "what breaks without it"), rows)


def patches() -> str:
    """A row for each name that a run replaces."""
    return _patch_table(PATCHES)


def rehearsal_patches() -> str:
    """A row for each name that a rehearsal replaces."""
    return _patch_table(REHEARSAL_PATCHES)


TABLES = {"seams": seams, "patches": patches, "rehearsal patches": rehearsal_patches}


def filled(page: str) -> str:
    """The page with its tables as the code has them."""
    for name, table in TABLES.items():
        marks = re.search(rf"<!-- {name}: .*? -->\n(.*?)<!-- end of {name} -->", page, re.DOTALL)
        assert marks is not None, f"the page has no place for {name}"
        page = page[: marks.start(1)] + table() + page[marks.end(1) :]
    return page


def _patch_table(table: tuple[Patch, ...]) -> str:
    rows = [
        (f"`{_short(patch.target)}`", patch.when, patch.why, patch.until, f"`{patch.installed_by}`")
        for patch in table
    ]
    return _table(("name", "when", "why", "until", "installed by"), rows)


def _short(name: str) -> str:
    return name.removeprefix("megatron.")


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
