"""The tokenizer of a run: its flags, its identity, and what preparing asks of it, all without Megatron.

Training uses Megatron's tokenizer. So does preparing, except that a worker process should not spend seconds on
importing Megatron: it gets the library's own object (Hugging Face's or SentencePiece's) as Megatron's class has set it
up, and only the calls of that object are written down a second time, here. `megatron_tokenizer.text_tokenizer` makes
these objects and refuses one whose ids are not Megatron's.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a library comes with its object, and is imported for that one only
    from sentencepiece import SentencePieceProcessor
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
# A text on which two copies of a tokenizer are compared: white space in every place, letters beyond ASCII and such as
# are in few vocabularies, digits, control tokens as text.
PROBE = "  The river,\n\n\ttwo  spaces; naïve 東京 🙂 \u2603 1234567 <s> </s> <|endoftext|> \n"

TOKENIZER_TYPES = (
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
)


@dataclass(frozen=True, slots=True)
class TokenizerSettings:
    """Names and values as in Megatron's flags; the same ones give the same ids in training.

    Attributes:
        chat_template: jinja text that replaces the tokenizer's own template.
    """

    tokenizer_type: str
    tokenizer_model: str
    chat_template: str | None = None


@dataclass(frozen=True, slots=True)
class TokenizerStamp:
    """What a prepared set remembers of its tokenizer: for a run to tell that its own gives ids the same meaning.

    Attributes:
        vocab_size: number of ids, added tokens included, padding not.
        vocabulary_sha256: hash of all (id, token) pairs; None when the tokenizer has no vocabulary.
    """

    vocab_size: int
    eod: int | None
    vocabulary_sha256: str | None


def check_tokenizer_files(tokenizer_type: str | None, tokenizer_model: str | None) -> None:
    """Refuse a tokenizer whose files are plainly not there, before anything looks for them online.

    Raises:
        ValueError: names the path and the flag.
    """
    if tokenizer_type not in TOKENIZER_TYPES:
        return
    if not tokenizer_model:
        raise ValueError(f"--tokenizer-type {tokenizer_type} needs --tokenizer-model")
    # A Hugging Face name has the form `owner/name`. Everything else is meant as a path, also what begins with a
    # folder that is here: asking the hub for a mistyped one would cost a minute of retries on every rank.
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


@dataclass(frozen=True)
class TextTokenizer(ABC):
    """What preparing asks of a tokenizer; can be pickled into a process without torch and Megatron.

    Attributes:
        chat_template: jinja text; None when there is none.
        eod: id that ends a document; negative when there is none.
        bos: id that may begin a sequence, likewise.
    """

    chat_template: str | None
    eod: int
    bos: int

    @abstractmethod
    def ids(self, text: str) -> list[int]:
        """What Megatron's `tokenize` gives: the tokens around a whole sequence included."""

    @abstractmethod
    def plain_ids(self, text: str) -> list[int]:
        """Ids of `text` without the tokens that a Hugging Face tokenizer puts around a whole sequence."""

    @abstractmethod
    def text(self, ids: list[int]) -> str:
        """What Megatron's `detokenize` gives."""

    @abstractmethod
    def render(self, messages: list[Message], *, add_generation_prompt: bool) -> str:
        """The text that the chat template makes. Raises jinja2.TemplateError."""

    @abstractmethod
    def special_ids(self) -> set[int]:
        """Ids of control tokens, the end of a document among them."""

    @cached_property
    def leading_ids(self) -> list[int]:
        """What this tokenizer puts before a sequence: the beginning-of-sequence id, or nothing."""
        first = self.ids("a")[:1]
        return first if first and first[0] == self.bos else []


@dataclass(frozen=True)
class HuggingFaceText(TextTokenizer):
    """A tokenizer of transformers."""

    library: PreTrainedTokenizerBase

    def ids(self, text: str) -> list[int]:
        return self.library(text).input_ids

    def plain_ids(self, text: str) -> list[int]:
        return self.library(text, add_special_tokens=False).input_ids

    def text(self, ids: list[int]) -> str:
        tokens = self.library.convert_ids_to_tokens(ids)
        return self.library.convert_tokens_to_string([token for token in tokens if token is not None])

    def render(self, messages: list[Message], *, add_generation_prompt: bool) -> str:
        text: Any = self.library.apply_chat_template(
            messages,
            chat_template=self.chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
        return text

    def marked_ids(self, messages: list[Message]) -> tuple[list[int], list[int]]:
        """Ids of a chat, and 1 for each that the template marks with `{% generation %}`."""
        encoded: Any = self.library.apply_chat_template(
            messages,
            chat_template=self.chat_template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        return encoded["input_ids"], encoded["assistant_masks"]

    def special_ids(self) -> set[int]:
        return {*self.library.all_special_ids, self.eod}


@dataclass(frozen=True)
class SentencePieceText(TextTokenizer):
    """A SentencePiece model."""

    library: SentencePieceProcessor

    def ids(self, text: str) -> list[int]:
        return self.library.encode_as_ids(text)

    def plain_ids(self, text: str) -> list[int]:
        return self.ids(text)

    def text(self, ids: list[int]) -> str:
        return self.library.decode_ids(ids)

    def render(self, messages: list[Message], *, add_generation_prompt: bool) -> str:
        # As Megatron does; the public ways to render need a tokenizer of transformers.
        from transformers.utils.chat_template_utils import _compile_jinja_template

        template = _compile_jinja_template(self.chat_template)
        return template.render(messages=messages, add_generation_prompt=add_generation_prompt)

    def special_ids(self) -> set[int]:
        return {self.eod}
