"""The words of a training's command line, divided for a producer."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import takewhile

from megatron_fdd.config.values import parse_teacher_stores

STORES = "--fdd-teacher-store"


def teachers_of(flags: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Return the training's teachers by names of data sets; none where it has one for all.

    Raises:
        ValueError: they cannot be read.
    """
    _, taken = cut(flags, {STORES: None})
    words = [word.removeprefix(f"{STORES}=") for word in taken if word != STORES]
    return tuple((name, folder) for name, folder in parse_teacher_stores(words) if name)


def cut(flags: Sequence[str], names: Mapping[str, int | None]) -> tuple[list[str], list[str]]:
    """Divide flags: the others, and those of `names` with so many words behind each; None: up to the next flag."""
    others: list[str] = []
    taken: list[str] = []
    words = deque(flags)
    while words:
        name, has_value, _ = words[0].partition("=")
        if name not in names:
            others.append(words.popleft())
            continue
        taken.append(words.popleft())
        count = names[name]
        if count is None:
            count = len(list(takewhile(lambda word: not word.startswith("--"), words)))
        taken += [words.popleft() for _ in range(0 if has_value else min(count, len(words)))]
    return others, taken
