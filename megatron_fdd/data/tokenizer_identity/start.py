"""The token that begins a sequence, kept only once."""

from __future__ import annotations

from collections.abc import Sequence


def without_second_start(ids: Sequence[int], bos: int | None) -> list[int]:
    """Return the ids without the start tokens that directly follow a first one.

    A tokenizer that puts `<s>` before every text makes two start tokens of "<s> a". One start token stays, and so
    does every `bos` further on.

    Args:
        bos: id of the start token; None or negative if there is none.
    """
    ids = list(ids)
    if bos is None or bos < 0:
        return ids
    first = next((index for index, token in enumerate(ids) if token != bos), len(ids))
    return ids[max(first - 1, 0) :]
