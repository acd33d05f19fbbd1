"""The rows of a model's embedding and head for the tokens of another model.

Shape letters: V the old vocabulary, W the new one, X whatever follows (the hidden size; nothing for a bias).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from megatron_fdd.convert.vocabulary_source import VocabularySource

# New rows that are made at a time: 8,192 wide and of three pieces each they take 100 MiB.
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class NewVocabulary:
    """For each row of the new vocabulary, the old tokens that it is made of.

    Attributes:
        origins: old ids for each new id, in the order of the text; none: the new row is the mean of all old rows.
        is_kept: for each new id, whether it has one origin and is that token: it stands for the same bytes, or has the
            same name or role.
    """

    origins: Sequence[Sequence[int]]
    is_kept: Sequence[bool]

    @classmethod
    def between(cls, old: VocabularySource, new: VocabularySource) -> NewVocabulary:
        """Compare two vocabularies.

        - A token of text is the old token of the same bytes, else the pieces into which the old model cuts its bytes.
        - A special token is the old special one of the same name, else that of the same role if no other new token is
          it already, else an old token of text with its name, else the pieces of its name.
        - A row without a token, or with one that no text has (`TokenBytes.is_idle`), has no origin: a second row like
          that of a token in use would take half of its probability.

        Raises:
            ValueError: there is no tokenizer, or none whose tokens can be compared.
        """
        by_role = _by_role(old, new)
        origins, is_kept = [], []
        for number in range(new.num_rows):
            same = _same(number, old, new)
            same = by_role.get(number) if same is None else same
            same = _named(number, old, new) if same is None else same
            found = _pieces(number, old, new) if same is None else [same]
            origins.append([each for each in found if each < old.num_rows])
            is_kept.append(same is not None and len(origins[-1]) == 1)
        return cls(origins, is_kept)

    @property
    def num_kept(self) -> int:
        """How many new rows are an old one."""
        return sum(self.is_kept)

    @property
    def num_without(self) -> int:
        """How many new rows have no origin."""
        return sum(not origin for origin in self.origins)

    @property
    def num_cut(self) -> int:
        """How many new rows are made of pieces."""
        return len(self.origins) - self.num_kept - self.num_without

    def rows(self, old_VX: Tensor) -> Tensor:
        """Return the new rows [W, X] in the dtype of the old ones.

        A token that is kept has its row, bit for bit. One of pieces is halfway between the mean of their rows and the
        mean of all: like its pieces, but not as likely as they are (benchmarks/LOG.md has other ways). Sums are in
        float32, or in float64 where the rows are.
        """
        wide = torch.promote_types(old_VX.dtype, torch.float32)
        mean_X = old_VX.mean(0, dtype=wide)
        new_WX = old_VX.new_empty(len(self.origins), *old_VX.shape[1:])
        for first in range(0, len(self.origins), _ROWS_AT_ONCE):
            part = self.origins[first : first + _ROWS_AT_ONCE]
            counts = torch.tensor([len(origin) for origin in part])
            ids = torch.tensor(list(chain.from_iterable(part)), dtype=torch.long)
            sums = torch.zeros(len(part), *old_VX.shape[1:], dtype=wide)
            sums.index_add_(0, torch.arange(len(part)).repeat_interleave(counts), old_VX[ids].to(wide))
            sums /= counts.clamp(min=1).view(-1, *[1] * (old_VX.dim() - 1))
            sums[counts == 0] = mean_X
            is_new = ~torch.tensor(self.is_kept[first : first + len(part)])
            sums[is_new] = (sums[is_new] + mean_X) / 2
            new_WX[first : first + len(part)] = sums
        return new_WX


def _same(number: int, old: VocabularySource, new: VocabularySource) -> int | None:
    """Return the old special token of the same name, or for one of text the same bytes; None if there is none."""
    if number in new.tokens.special:
        found = old.tokens.tokenizer.token_to_id(new.tokens.special[number])
        return found if found in old.tokens.special else None
    if number in new.tokens.by_id and not new.tokens.is_idle(number):
        return old.tokens.by_bytes.get(new.tokens.by_id[number])
    return None


def _named(number: int, old: VocabularySource, new: VocabularySource) -> int | None:
    """Return the old token of text that is written as a special one, as a marker may be; None if there is none."""
    if number not in new.tokens.special:
        return None
    return old.tokens.tokenizer.token_to_id(new.tokens.special[number])


def _by_role(old: VocabularySource, new: VocabularySource) -> dict[int, int]:
    """Return the old token of the same role for each new token with a role that is no old one otherwise."""
    taken = {_same(number, old, new) for number in (*new.tokens.special, *new.roles.values())}
    found: dict[int, int] = {}
    for role, number in new.roles.items():
        theirs = old.roles.get(role)
        if theirs is None or theirs in taken or number in found or _same(number, old, new) is not None:
            continue
        found[number] = theirs
        taken.add(theirs)
    return found


def _pieces(number: int, old: VocabularySource, new: VocabularySource) -> list[int]:
    if number in new.tokens.special:
        return old.tokens.pieces(new.tokens.special[number].encode())
    if number in new.tokens.by_id and not new.tokens.is_idle(number):
        return old.tokens.pieces(new.tokens.by_id[number])
    return []
