"""The identity of a tokenizer: which token each id means, and which ids a text becomes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from megatron_fdd.data.tokenizer_identity.probe import added_line, digest, probe_lines

# The rules that turn text into ids; "words": only the vocabulary is known, and no such rules.
Library = Literal["tokenizers", "sentencepiece", "python", "words"]


@dataclass(frozen=True, slots=True)
class TokenizerStamp:
    """An identity to store: hashes, and in words only the added tokens, because they are few.

    Attributes:
        num_ids: number of tokens, added ones included.
        last_word: largest id of a token that was not added.
        words_sha256: hash of all (id, token) that were not added.
        added: token -> id.
        added_probe: token -> hash of the ids of a text around it.
        probe: name of a line -> hash of its ids.
        parts: part of `tokenizer.json` -> its hash.
        eod: id that ends a document.
    """

    library: Library
    num_ids: int
    smallest_id: int
    largest_id: int
    last_word: int
    words_sha256: str
    added: dict[str, int]
    added_probe: dict[str, str]
    probe: dict[str, str]
    parts: dict[str, str]
    eod: int | None
    eod_token: str | None


@dataclass(frozen=True)
class TokenizerIdentity:
    """A tokenizer in memory, reduced to what is compared.

    Attributes:
        vocabulary: every token -> id, added ones included.
        added: tokens that are searched for in a text before anything else; token -> id.
        encode: ids of a text without anything around it; None where only the vocabulary is known.
        parts: as in `TokenizerStamp`.
    """

    library: Library
    vocabulary: Mapping[str, int] = field(repr=False)
    added: Mapping[str, int] = field(repr=False)
    encode: Callable[[str], list[int]] | None = field(default=None, repr=False)
    parts: Mapping[str, str] = field(default_factory=dict, repr=False)
    eod: int | None = None

    @cached_property
    def token_of(self) -> dict[int, str]:
        """The token of each id."""
        return {index: token for token, index in self.vocabulary.items()}

    @cached_property
    def unfound(self) -> frozenset[str]:
        """Added tokens that `encode` does not find in a text."""
        return frozenset(self.added.keys() - self.stamp.added_probe.keys())

    def words(self, last_word: int, without: Collection[int]) -> list[int]:
        """Return the ids up to `last_word` that are not in `without`.

        These are another tokenizer's words, if the tokenizers agree.
        """
        return sorted(index for index in self.token_of if index <= last_word and index not in without)

    def words_sha256(self, words: Collection[int]) -> str:
        """Return the hash of these ids with their tokens."""
        lines = "".join([f"{index}\t{self.token_of[index]}\n" for index in words])
        return hashlib.sha256(lines.encode("utf-8", "surrogatepass")).hexdigest()

    @cached_property
    def stamp(self) -> TokenizerStamp:
        """The identity in the form that is stored."""
        without = set(self.added.values())
        words = [index for index in self.token_of if index not in without]
        last_word = max(words, default=-1)
        lines = {} if self.encode is None else probe_lines(self.token_of, words)
        encode = self.encode or _no_ids
        around = {token: encode(added_line(token)) for token in self.added}
        return TokenizerStamp(
            library=self.library,
            num_ids=len(self.token_of),
            smallest_id=min(self.token_of, default=0),
            largest_id=max(self.token_of, default=-1),
            last_word=last_word,
            words_sha256=self.words_sha256(sorted(words)),
            added=dict(sorted(self.added.items(), key=lambda pair: pair[1])),
            # `encode` does not find tokens that only a file beside the vocabulary names.
            added_probe={token: digest(ids) for token, ids in around.items() if self.added[token] in ids},
            probe={name: digest(encode(text)) for name, text in lines.items()},
            parts=dict(self.parts),
            eod=self.eod,
            eod_token=None if self.eod is None else self.token_of.get(self.eod),
        )


def _no_ids(_text: str) -> list[int]:
    return []


@dataclass(frozen=True, slots=True)
class FormerStamp:
    """The stamp in sets of an older version: a hash of the vocabulary, added tokens included.

    Attributes:
        vocab_size: number of ids.
        vocabulary_sha256: None when the tokenizer had no vocabulary.
    """

    vocab_size: int
    eod: int | None
    vocabulary_sha256: str | None

    def matches(self, identity: TokenizerIdentity) -> bool:
        """Whether the ids that the stamp covers mean the same; tokens added since do no harm."""
        pairs = sorted(identity.token_of.items())
        lines = "".join([f"{index}\t{token!r}\n" for index, token in pairs if index < self.vocab_size])
        return hashlib.sha256(lines.encode("utf-8", "surrogatepass")).hexdigest() == self.vocabulary_sha256
