"""Megatron's tokenizer: loaded as training loads it, compared with others, and reduced to what preparing needs."""

from __future__ import annotations

import hashlib
import sys

from megatron.core.tokenizers.text.text_tokenizer import MegatronTokenizerText
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training.config import TokenizerConfig

from megatron_fdd.data.tokenizer import (
    PROBE,
    HuggingFaceText,
    SentencePieceText,
    TextTokenizer,
    TokenizerSettings,
    TokenizerStamp,
    check_tokenizer_files,
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


def text_tokenizer(tokenizer: MegatronTokenizerText) -> TextTokenizer:
    """The same tokenizer without Megatron's classes around it.

    Raises:
        ValueError: its ids are not those of Megatron's.
    """
    inner = tokenizer._tokenizer  # the wrapper has no name for the object of the library
    make = {"huggingface": HuggingFaceText, "sentencepiece": SentencePieceText}[tokenizer.library]
    eod, bos = (-1 if token_id is None else token_id for token_id in (tokenizer.eod, tokenizer.bos))
    text = make(tokenizer.chat_template, eod, bos, inner.tokenizer)
    for probe in (PROBE, PROBE.strip(), "a"):
        ids = tokenizer.tokenize(probe)
        if text.ids(probe) != ids or text.text(ids) != tokenizer.detokenize(ids):
            raise ValueError(
                f"Megatron's {type(inner).__name__} gives {probe!r} other ids than its library by itself, which "
                "fdd prepare uses; install the version of Megatron in constraints.txt"
            )
    return text
