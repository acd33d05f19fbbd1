"""The bytes that each token of a `tokenizer.json` stands for, and how a text's bytes are cut into a model's pieces."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from megatron_fdd.host.json_file import read_json

TOKENIZER_FILE = "tokenizer.json"
# SentencePiece's sign for a space.
_SPACE = "\u2581"
# Its name of a byte for which there is no token.
_BYTE = "<0x{:02X}>"


@dataclass(frozen=True)
class TokenBytes:
    """A tokenizer whose tokens are compared with another's by the bytes that they stand for.

    Attributes:
        is_byte_level: whether a token's letters stand for bytes, as GPT-2's do; else they are SentencePiece's.
        special: the tokens that no text is made of, by their ids.
    """

    tokenizer: Tokenizer
    is_byte_level: bool
    special: dict[int, str]

    @classmethod
    def read(cls, folder: Path) -> TokenBytes:
        """Read a model folder's `tokenizer.json`.

        Raises:
            ValueError: there is none, it cannot be read, or its tokens are neither byte-level nor SentencePiece's.
        """
        path = folder / TOKENIZER_FILE
        if not path.is_file():
            raise ValueError(
                f"{folder}: has no {TOKENIZER_FILE}; save its tokenizer with transformers' "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        content = read_json(path)
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # whatever the library raises, which is a bare Exception
            raise ValueError(f"{path}: cannot be read ({error}); copy the file again") from error
        kinds = set(_kinds(content.get("decoder"))) | set(_kinds(content.get("pre_tokenizer")))
        words = json.dumps(content.get("decoder"))
        if "ByteLevel" not in kinds and "Metaspace" not in kinds and json.dumps(_SPACE)[1:-1] not in words:
            raise ValueError(
                f"{path}: its tokens are neither byte-level (GPT-2, Llama 3, Qwen) nor SentencePiece's, and what they "
                "stand for is not known; choose another model"
            )
        added = tokenizer.get_added_tokens_decoder()
        special = {number: token.content for number, token in added.items() if token.special}
        return cls(tokenizer, "ByteLevel" in kinds, special)

    def __len__(self) -> int:
        """One more than the largest id."""
        return 1 + max(self.tokenizer.get_vocab().values())

    @cached_property
    def by_id(self) -> dict[int, bytes]:
        """What each token stands for, special tokens excepted."""
        added = self.tokenizer.get_added_tokens_decoder()
        return {
            number: added[number].content.encode() if number in added else self._bytes_of(token)
            for token, number in self.tokenizer.get_vocab().items()
            if number not in self.special
        }

    @cached_property
    def by_bytes(self) -> dict[bytes, int]:
        """The lowest id of each string of bytes."""
        return {found: number for number, found in sorted(self.by_id.items(), reverse=True)}

    def pieces(self, data: bytes) -> list[int]:
        """Return the ids of the pieces into which this tokenizer's model cuts some bytes; without its normaliser."""
        ids: list[int] = []
        for text in self._spelled(data):
            number = self.tokenizer.token_to_id(text)
            ids += (
                [number] if number is not None else [t.id for t in self.tokenizer.model.tokenize(text)]
            )
        return ids

    def _bytes_of(self, token: str) -> bytes:
        if self.is_byte_level:
            return b"".join(_LETTERS[letter] if letter in _LETTERS else letter.encode() for letter in token)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace(_SPACE, " ").encode()

    def _spelled(self, data: bytes) -> Iterator[str]:
        """Write bytes in this tokenizer's letters: a text, or a token each for bytes that are no text."""
        if self.is_byte_level:
            yield "".join(_BYTES[byte] for byte in data)
            return
        text = ""
        for letter in data.decode(errors="surrogateescape"):
            if "\udc80" <= letter <= "\udcff":
                yield from [text] * bool(text)
                text = ""
                yield _BYTE.format(ord(letter) - 0xDC00)
            else:
                text += _SPACE if letter == " " else letter
        yield from [text] * bool(text)


def _kinds(part: Any) -> Iterator[str]:
    """Yield the types of a part of `tokenizer.json` and of what it consists of."""
    if isinstance(part, dict):
        if isinstance(part.get("type"), str):
            yield part["type"]
        for value in part.values():
            yield from _kinds(value)
    elif isinstance(part, list):
        for value in part:
            yield from _kinds(value)


def _letters() -> dict[int, str]:
    """Return GPT-2's letter for each byte: the byte's own where that can be printed, else one from 256 on."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {byte: chr(byte) for byte in own} | {byte: chr(256 + at) for at, byte in enumerate(others)}


_BYTES = _letters()
_LETTERS = {letter: bytes([byte]) for byte, letter in _BYTES.items()}
