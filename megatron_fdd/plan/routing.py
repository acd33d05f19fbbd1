"""Which teacher teaches which data set: names of the user, found in the prefixes of the data. Texts only."""

from __future__ import annotations

from collections.abc import Sequence

FLAG = "--fdd-teacher-store"


def routes(names: Sequence[str], prefixes: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Find the data sets of each name: a name is a prefix, or one or several parts of it between slashes.

    A name that is a whole prefix is meant before one that is a part of it.

    Raises:
        ValueError: a data set has no name or several, or a name has no data set; names all of both.
    """
    all_of_both = f"the data sets are {', '.join(prefixes)}; the names are {', '.join(names)}"
    found: dict[str, list[str]] = {name: [] for name in names}
    for prefix in prefixes:
        whole = [name for name in names if name == prefix]
        fits = whole or [name for name in names if _is_part(name, prefix)]
        if not fits:
            raise ValueError(
                f"{FLAG}: no teacher for the data set {prefix}: {all_of_both}. Add NAME=DIR for it, where NAME is a "
                "part of its prefix between slashes, or leave it out of the data"
            )
        if len(fits) > 1:
            raise ValueError(
                f"{FLAG}: several teachers for the data set {prefix}, {' and '.join(fits)}: {all_of_both}. Give names "
                "that are in one prefix only, or whole prefixes"
            )
        found[fits[0]].append(prefix)
    unused = [name for name, own in found.items() if not own]
    if unused:
        raise ValueError(
            f"{FLAG}: no data set is called {unused[0]}: {all_of_both}. A name is a part of a prefix between slashes, "
            "or all of it; correct it, or leave its store out"
        )
    return {name: tuple(own) for name, own in found.items()}


def _is_part(name: str, prefix: str) -> bool:
    return f"/{name.strip('/')}/" in f"/{prefix}/"
