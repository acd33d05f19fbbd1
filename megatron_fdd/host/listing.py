"""Long lists of names in short messages."""

from __future__ import annotations

from collections.abc import Sequence


def listing(names: Sequence[str], limit: int = 8) -> str:
    """Return the first names, and how many more there are."""
    if not names:
        return "none"
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
