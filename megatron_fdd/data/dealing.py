"""Dealing of documents to the train, valid and test sets by their shares."""

from __future__ import annotations


class Shares:
    """A dealer: gives documents to the sets so that after each one the counts are as near the shares as possible.

    The order of the documents alone decides, so any number of workers gives the same sets, and every stretch of the
    corpus is in all of them.
    """

    def __init__(self, shares: tuple[float, ...], dealt: list[int]) -> None:
        """Start from `dealt`, how many documents each set has; empty at first, and updated with every document."""
        total = sum(shares) or 1.0
        self._shares = [share / total for share in shares] or [1.0]
        self._dealt = dealt
        if not dealt:
            dealt += [0] * len(self._shares)

    def next(self) -> int:
        """Return the number of the set that gets the next document."""
        number = sum(self._dealt) + 1
        debts = [share * number - dealt for share, dealt in zip(self._shares, self._dealt, strict=True)]
        part = debts.index(max(debts))
        self._dealt[part] += 1
        return part
