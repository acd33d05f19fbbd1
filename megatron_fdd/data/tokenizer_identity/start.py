"""The token that begins a sequence, once."""

from __future__ import annotations

from collections.abc import Sequence


def without_second_start(ids: Sequence[int], bos: int | None) -> list[int]:
    """The ids without the start tokens that follow a first one: of a text that begins with the literal token.

    A tokenizer that puts `<s>` before every text makes two of "<s> a". One start token, and every `bos` further on,
    stays as it is.

    Args:
        bos: id of the start token; None or negative when there is none.
    """
    ids = list(ids)
    if bos is None or bos < 0:
        return ids
    first = next((index for index, token in enumerate(ids) if token != bos), len(ids))
    return ids[max(first - 1, 0) :]
