"""The bytes that each token of a `tokenizer.json` stands for, and the tokens into which it cuts given bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from megatron_fdd.host.json_file import read_json
from megatron_fdd.host.model_fields import VOCABULARY
from megatron_fdd.host.panics import panics_as_errors, unprinted_panics

TOKENIZER_FILE = "tokenizer.json"
_MODELS = ("BPE", "Unigram")
# SentencePiece's sign for a space, and its name of a byte.
_SPACE = "\u2581"
_BYTE = re.compile("<0x([0-9A-F]{2})>")
# How Python's decoder writes a byte that is no text, and how many values a byte has.
_NO_TEXT, _BYTES = 0xDC00, 256


@dataclass(frozen=True)
class TokenBytes:
    """A tokenizer whose tokens can be compared with another's by the bytes that they stand for.

    Attributes:
        is_byte_level: whether a token's letters stand for bytes, as GPT-2's do; else they are SentencePiece's.
        special: the tokens that no text is made of, by their ids.
        unknown: id of the token for what the vocabulary lacks.
    """

    tokenizer: Tokenizer
    is_byte_level: bool
    special: dict[int, str]
    unknown: int | None

    @classmethod
    @unprinted_panics()
    def read(cls, folder: Path) -> TokenBytes:
        """Read a folder's `tokenizer.json`.

        Raises:
            ValueError: there is none, it cannot be read, or what its tokens stand for is not known.
        """
        path = folder / TOKENIZER_FILE
        if not path.is_file():
            raise ValueError(
                f"{folder}: has no {TOKENIZER_FILE}; save its tokenizer with transformers' "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...), or where vocab.json and merges.txt lie alone "
                "with GPT2Tokenizer in its place"
            )
        content = read_json(path)
        try:
            with panics_as_errors():
                tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises no narrower class
            raise ValueError(f"{path} cannot be read as a tokenizer ({error}); fetch it again") from error
        kinds = {*_kinds(content.get("decoder")), *_kinds(content.get("pre_tokenizer"))}
        is_sentencepiece = "Metaspace" in kinds or _SPACE in _texts(content.get("decoder"))
        model = content["model"]
        if model.get("type", "BPE") not in _MODELS or not (is_sentencepiece or "ByteLevel" in kinds):
            raise ValueError(
                f"{path}: its tokens are neither byte-level as GPT-2's (Llama 3, Qwen) nor SentencePiece's (Llama 2, "
                "Gemma), and which bytes they stand for is not known; choose another model"
            )
        largest = max(tokenizer.get_vocab().values(), default=-1)
        if not VOCABULARY.fits(largest + 1):
            raise ValueError(
                f"{path}: its largest id is {largest}, and the number of ids must be {VOCABULARY.words}; fetch it again"
            )
        added = tokenizer.get_added_tokens_decoder()
        special = {number: token.content for number, token in added.items() if token.special}
        name = model.get("unk_token")  # Unigram has an id
        unknown = tokenizer.token_to_id(name) if isinstance(name, str) else model.get("unk_id")
        return cls(tokenizer, "ByteLevel" in kinds, special, unknown)

    @cached_property
    def num_ids(self) -> int:
        """One more than the largest id."""
        return 1 + max(self.tokenizer.get_vocab().values())

    @cached_property
    def by_id(self) -> dict[int, bytes]:
        """What each token stands for, special tokens left out."""
        added = self.tokenizer.get_added_tokens_decoder()
        return {
            number: added[number].content.encode() if number in added else self._bytes_of(token)
            for token, number in self.tokenizer.get_vocab().items()
            if number not in self.special and number != self.unknown
        }

    @cached_property
    def by_bytes(self) -> dict[bytes, int]:
        """The token of a string of bytes; of several, not a byte token, and then the one with the lowest id."""
        numbers = sorted(self.by_id, key=lambda number: (number in self.byte_tokens, number), reverse=True)
        return {self.by_id[number]: number for number in numbers}

    @cached_property
    def byte_tokens(self) -> frozenset[int]:
        """SentencePiece's tokens of one byte, which it uses where it has no other token."""
        if self.is_byte_level:
            return frozenset()
        names = self.tokenizer.get_vocab().items()
        return frozenset(number for token, number in names if _BYTE.fullmatch(token))

    def is_idle(self, number: int) -> bool:
        """Whether no text has this token: the token of a byte for which there is another token."""
        return number in self.byte_tokens and self.by_bytes[self.by_id[number]] != number

    def pieces(self, data: bytes) -> list[int]:
        """Return the tokens into which the model cuts some bytes, without normaliser and without unknown ones."""
        if self.is_byte_level:
            return self._cut("".join(_LETTER_OF[byte] for byte in data))
        ids: list[int] = []
        letters = data.decode(errors="surrogateescape")
        for is_text, group in groupby(letters, lambda letter: not 0 <= ord(letter) - _NO_TEXT < _BYTES):
            if is_text:
                ids += self._cut("".join(group).replace(" ", _SPACE))
            else:
                found = (self.by_bytes.get(bytes([ord(letter) - _NO_TEXT])) for letter in group)
                ids += [number for number in found if number is not None]
        return ids

    def _cut(self, text: str) -> list[int]:
        whole = self.tokenizer.token_to_id(text)
        if whole is not None and whole not in self.special:  # what a text only looks like
            return [whole]
        found = (piece.id for piece in self.tokenizer.model.tokenize(text))
        return [number for number in found if number != self.unknown and number not in self.special]

    def _bytes_of(self, token: str) -> bytes:
        if self.is_byte_level:
            return b"".join(_BYTE_OF.get(letter, letter.encode()) for letter in token)
        byte = _BYTE.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else token.replace(_SPACE, " ").encode()


def _kinds(part: Any) -> Iterator[str]:
    """Yield the types of a part of `tokenizer.json` and of all that it consists of."""
    if isinstance(part, dict):
        if isinstance(part.get("type"), str):
            yield part["type"]
        for value in part.values():
            yield from _kinds(value)
    elif isinstance(part, list):
        for value in part:
            yield from _kinds(value)


def _texts(part: Any) -> str:
    return json.dumps(part, ensure_ascii=False)


def _letters() -> dict[int, str]:
    """Return GPT-2's letter for each byte: the byte's own where that can be printed, else one from 256 on."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(_BYTES) if byte not in own]
    return {byte: chr(byte) for byte in own} | {byte: chr(_BYTES + at) for at, byte in enumerate(others)}


_LETTER_OF = _letters()
_BYTE_OF = {letter: bytes([byte]) for byte, letter in _LETTER_OF.items()}
