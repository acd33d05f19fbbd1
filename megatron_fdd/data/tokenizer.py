"""The tokenizer of a run: Megatron's own, and the identity by which two of them are compared."""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import dataclass

from megatron.core.tokenizers.text.text_tokenizer import MegatronTokenizerText
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training.config import TokenizerConfig

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


def load_tokenizer(settings: TokenizerSettings) -> MegatronTokenizerText:
    """Megatron's tokenizer for these flags.

    Raises:
        ValueError: the files are missing or cannot be read.
    """
    check_tokenizer_files(settings.tokenizer_type, settings.tokenizer_model)
    config = TokenizerConfig(
        tokenizer_type=settings.tokenizer_type,
        tokenizer_model=settings.tokenizer_model,
        chat_template=settings.chat_template,
        pad_vocab_size=False,
    )
    try:
        tokenizer = build_tokenizer(config)
    except (ValueError, OSError, RuntimeError) as error:
        raise ValueError(
            f"cannot load --tokenizer-model {settings.tokenizer_model} as a {settings.tokenizer_type}: "
            f"{error}"
        ) from error
    if tokenizer.library == "huggingface":
        # Documents are cut later; the warning about a model's longest input would only mislead.
        tokenizer._tokenizer.tokenizer.model_max_length = sys.maxsize
    return tokenizer


def identify(tokenizer: MegatronTokenizerText, first_ids: int | None = None) -> TokenizerStamp:
    """The identity of a tokenizer, or of its first `first_ids` ids (tokens added later are left out)."""
    try:
        vocabulary = tokenizer.inv_vocab
    except (NotImplementedError, AttributeError):
        vocabulary = None
    digest = None
    if vocabulary is not None:
        limit = tokenizer.vocab_size if first_ids is None else first_ids
        lines = (f"{i}\t{token!r}\n" for i, token in sorted(vocabulary.items()) if i < limit)
        digest = hashlib.sha256("".join(lines).encode("utf-8", "surrogatepass")).hexdigest()
    return TokenizerStamp(tokenizer.vocab_size, tokenizer.eod, digest)


def plain_ids(tokenizer: MegatronTokenizerText, text: str) -> list[int]:
    """Ids of `text` without the tokens that a Hugging Face tokenizer puts around a whole sequence."""
    library = tokenizer._tokenizer  # the wrapper offers no call without special tokens
    if tokenizer.library == "huggingface":
        return library.tokenizer(text, add_special_tokens=False).input_ids
    return library.text_to_ids(text)


def leading_ids(tokenizer: MegatronTokenizerText) -> list[int]:
    """What this tokenizer puts before a sequence: the beginning-of-sequence id, or nothing."""
    first = tokenizer.tokenize("a")[:1]
    return first if first and first[0] == tokenizer.bos else []
