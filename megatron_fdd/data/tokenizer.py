"""The tokenizer of a run: its flags, and the calls that preparing makes, all without Megatron.

Training uses Megatron's tokenizer, and so does preparing. But a worker process should not spend seconds on
importing Megatron: it gets the library's own object (Hugging Face's or SentencePiece's), which Megatron's class has
set up. Only the calls of that object are written a second time, here. `megatron_tokenizer.text_tokenizer` makes
these objects and refuses one whose ids are not Megatron's.
"""

from __future__ import annotations

import operator
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_fdd.data.chat_template import ChatSettings, ChatTemplate
from megatron_fdd.data.tokenizer_identity import has_tokenizer
from megatron_fdd.host.json_file import read_json
from megatron_fdd.host.panics import panics_as_errors

if TYPE_CHECKING:  # a tokenizer's library is imported where the tokenizer is made
    from sentencepiece import SentencePieceProcessor
    from transformers import PreTrainedTokenizerBase

# A text on which a tokenizer is compared with its copy in a worker: white space in every place, letters beyond ASCII,
# letters that few vocabularies have, digits, control tokens as text.
PROBE = "  The river,\n\n\ttwo  spaces; naïve 東京 🙂 \u2603 1234567 <s> </s> <|endoftext|> \n"

TOKENIZER_TYPES = (
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
)


@dataclass(frozen=True, slots=True)
class TokenizerSettings:
    """The tokenizer's flags, named as in Megatron; the same values give the same ids in training.

    Attributes:
        chat_template: jinja text that replaces the tokenizer's own template.
        eod_token: the token that ends a document; None for the tokenizer's own end of sequence.
    """

    tokenizer_type: str
    tokenizer_model: str
    chat_template: str | None = None
    eod_token: str | None = None


def check_tokenizer_files(tokenizer_type: str | None, tokenizer_model: str | None) -> None:
    """Refuse a tokenizer whose files do not exist or are none, before anything looks for them online.

    Raises:
        ValueError: names the path.
    """
    if tokenizer_type not in TOKENIZER_TYPES:
        return
    if not tokenizer_model:
        raise ValueError(f"--tokenizer-type {tokenizer_type} needs --tokenizer-model")
    # A Hugging Face name has the form `owner/name`. Everything else is taken for a path, and so is a name that begins
    # with a folder that exists: asking the hub for a mistyped path would cost a minute of retries on every rank.
    owner, *rest = tokenizer_model.split("/")
    may_be_a_name = (
        tokenizer_type == "HuggingFaceTokenizer"
        and len(rest) == 1
        and owner not in ("", ".", "..", "~")
        and not os.path.exists(owner)
    )
    if not may_be_a_name and not os.path.exists(tokenizer_model):
        raise ValueError(
            f"--tokenizer-model {tokenizer_model} does not exist; give the folder of a Hugging Face "
            "tokenizer (or its owner/name on the hub) or the file of a SentencePiece model"
        )
    if os.path.exists(tokenizer_model) and not (
        os.path.isfile(tokenizer_model) or os.path.isdir(tokenizer_model)
    ):
        raise ValueError(
            f"--tokenizer-model {tokenizer_model} is neither a file nor a folder (a pipe, a device); give one"
        )
    has_tokenizer(Path(tokenizer_model))  # refuses what is no file


def generation_stops(tokenizer_model: str) -> tuple[int, ...]:
    """Return the ids at which the model in this folder ends a generation; none without `generation_config.json`.

    Raises:
        ValueError: the file is not a JSON object, or names something else than ids.
    """
    path = os.path.join(tokenizer_model, "generation_config.json")
    if not os.path.isfile(path):
        return ()
    named = read_json(Path(path)).get("eos_token_id")
    try:
        ids = named if isinstance(named, list) else [] if named is None else [named]
        return tuple(operator.index(each) for each in ids)
    except TypeError as error:
        raise ValueError(f"{path}: eos_token_id cannot be read ({error})") from error


@dataclass(frozen=True)
class TextTokenizer(ABC):
    """A tokenizer with the calls that preparing makes; can be pickled into a process without torch and Megatron.

    Attributes:
        chat_template: jinja text, or several by name; None when there is none.
        eod: id that ends a document; negative without one.
        bos: id that may begin a sequence; negative without one.
        stop_ids: ids at which the model's own `generation_config.json` ends a generation.
    """

    chat_template: str | Mapping[str, str] | None
    eod: int
    bos: int
    stop_ids: tuple[int, ...]

    @abstractmethod
    def ids(self, text: str) -> list[int]:
        """Return what Megatron's `tokenize` returns, which includes the tokens around a whole sequence."""

    @abstractmethod
    def plain_ids(self, text: str) -> list[int]:
        """Return the ids of `text` without the tokens that a Hugging Face tokenizer puts around a whole sequence."""

    @abstractmethod
    def ids_and_places(self, text: str) -> tuple[list[int], list[tuple[int, int]] | None]:
        """Return `plain_ids`, and the characters that each stands for (None: this tokenizer does not tell)."""

    @abstractmethod
    def text(self, ids: list[int]) -> str:
        """Return what Megatron's `detokenize` returns."""

    @abstractmethod
    def added_tokens(self) -> dict[str, bool]:
        """Return the texts that are a token wherever they stand, such as `<|im_end|>`. True: a control token."""

    @abstractmethod
    def special_tokens(self) -> dict[str, Any]:
        """Return the tokens that chat templates know by name: `bos_token`, `eos_token` and the like."""

    def chat(self, settings: ChatSettings) -> ChatTemplate:
        """Return the chat template with this tokenizer's tokens.

        Raises:
            ValueError: there is no chat template, or it lacks a variable that the settings set.
        """
        if not self.chat_template:
            raise ValueError(
                "a chat needs a chat template and this tokenizer has none; give one with --chat-template, or use "
                "the fields prompt and response"
            )
        sources = [self.chat_template] if isinstance(self.chat_template, str) else self.chat_template.values()
        unknown = [name for name in settings.variables if not any(name in source for source in sources)]
        if unknown:
            raise ValueError(
                f"--chat-template-kwargs: the chat template has no variable {', '.join(unknown)}; use its own "
                "switches (chat_template.jinja or tokenizer_config.json has them)"
            )
        ends = {self.text([end]) for end in (self.eod, *self.stop_ids) if end >= 0}
        return ChatTemplate(
            self.chat_template,
            self.special_tokens(),
            self.added_tokens(),
            frozenset(ends & self.added_tokens().keys()),
            settings.variables,
            settings.date,
            settings.place,
        )

    @cached_property
    def leading_ids(self) -> list[int]:
        """The ids that this tokenizer puts before a sequence: the beginning-of-sequence id, or nothing."""
        first = self.ids("a")[:1]
        return first if first and first[0] == self.bos else []

    @property
    def start(self) -> int | None:
        """The id of `leading_ids`; None where this tokenizer puts nothing before a sequence."""
        return self.leading_ids[0] if self.leading_ids else None


@dataclass(frozen=True)
class HuggingFaceText(TextTokenizer):
    """A tokenizer of transformers."""

    library: PreTrainedTokenizerBase

    def ids(self, text: str) -> list[int]:
        with panics_as_errors():
            return self.library(text).input_ids

    def plain_ids(self, text: str) -> list[int]:
        with panics_as_errors():
            return self.library(text, add_special_tokens=False).input_ids

    def ids_and_places(self, text: str) -> tuple[list[int], list[tuple[int, int]] | None]:
        if not self.library.is_fast:
            return self.plain_ids(text), None
        with panics_as_errors():
            encoded = self.library(text, add_special_tokens=False, return_offsets_mapping=True)
        return encoded.input_ids, encoded["offset_mapping"]

    def text(self, ids: list[int]) -> str:
        tokens = self.library.convert_ids_to_tokens(ids)
        return self.library.convert_tokens_to_string([token for token in tokens if token is not None])

    def added_tokens(self) -> dict[str, bool]:
        return {token.content: token.special for token in self.library.added_tokens_decoder.values()}

    def special_tokens(self) -> dict[str, Any]:
        return dict(self.library.special_tokens_map)


@dataclass(frozen=True)
class SentencePieceText(TextTokenizer):
    """A SentencePiece model."""

    library: SentencePieceProcessor

    def ids(self, text: str) -> list[int]:
        return self.library.encode_as_ids(text)

    def plain_ids(self, text: str) -> list[int]:
        return self.ids(text)

    def ids_and_places(self, text: str) -> tuple[list[int], list[tuple[int, int]] | None]:
        library: Any = self.library  # its stubs lack these
        if hasattr(library, "encode_as_offset_mapping"):
            found = library.encode_as_offset_mapping(text)
            return found["ids"], found["offsets"]
        pieces = library.encode_as_immutable_proto(text).pieces  # sentencepiece up to 0.2.1
        return [piece.id for piece in pieces], [(piece.begin, piece.end) for piece in pieces]

    def text(self, ids: list[int]) -> str:
        return self.library.decode_ids(ids)

    def added_tokens(self) -> dict[str, bool]:
        """Return pieces such as `<|im_end|>` that the model was trained to keep whole, without control pieces."""
        pieces = (self.library.id_to_piece(index) for index in range(self.library.get_piece_size()))
        bracketed = [piece for piece in pieces if re.fullmatch(r"<.+>|\[.+\]", piece)]
        return {piece: True for piece in bracketed if self.library.piece_to_id(piece) in self.ids(piece)}

    def special_tokens(self) -> dict[str, Any]:
        return {}
