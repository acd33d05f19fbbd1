"""The kinds of terms that the runs have, and how the report shows each, by the table of terms."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_fdd.evaluate.report.runs import Run
from megatron_fdd.losses.term import TapTerm
from megatron_fdd.losses.terms import SHARE, TERMS

# For terms without a colour of their own, one after the other.
_COLORS = ("#b07aa1", "#d37295", "#59a14f", "#9c755f", "#76b7b2", "#6b4c9a")


@dataclass(frozen=True, slots=True)
class Kind:
    """How a kind of term is shown; see `Term`.

    A kind of a plug-in that is not loaded has only its name.
    """

    name: str
    title: str = ""
    unit: str = ""
    color: str = ""
    caption: str = "Its value at each sampled layer."
    flags: tuple[str, ...] = ()


def kinds_of(runs: Sequence[Run]) -> list[Kind]:
    """Return every kind of the table, then other kinds that the metrics files have."""
    known = [
        Kind(
            term.kind,
            term.title,
            term.unit,
            term.color,
            term.caption if isinstance(term, TapTerm) else "",
            tuple(f"fdd_{name}" for name in term.settings),
        )
        for term in TERMS
    ]
    shares = {key for run in runs if run.metrics for key in run.metrics.curves if key.startswith(SHARE)}
    others = {key.removeprefix(SHARE) for key in shares} - {kind.name for kind in known}
    kinds = known + [Kind(name) for name in sorted(others)]
    free = itertools.cycle(_COLORS)
    return [kind if kind.color else replace(kind, color=next(free)) for kind in kinds]
