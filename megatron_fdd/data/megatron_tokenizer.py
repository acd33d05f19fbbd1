"""Megatron's tokenizer: loaded as training loads it, compared with others, and reduced to what preparing needs."""

from __future__ import annotations

import sys
from functools import lru_cache

from megatron.core.tokenizers import MegatronTokenizerBase
from megatron.core.tokenizers.text.text_tokenizer import MegatronTokenizerText
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training.config import TokenizerConfig

from megatron_fdd.data.tokenizer import (
    PROBE,
    HuggingFaceText,
    SentencePieceText,
    TextTokenizer,
    TokenizerSettings,
    check_tokenizer_files,
)
from megatron_fdd.data.tokenizer_identity import (
    TokenizerIdentity,
    TokenizerStamp,
    checked_identity,
    identity_of_sentencepiece,
)
from megatron_fdd.host.panics import PanicError, panics_as_errors, unprinted_panics


@unprinted_panics()
def load_tokenizer(settings: TokenizerSettings) -> MegatronTokenizerText:
    """Load Megatron's tokenizer for these flags.

    Raises:
        ValueError: the files are missing or cannot be read; the tokenizer gives other ids than its own tokenizer.json
            says; or it lacks the token that is to end documents.
    """
    check_tokenizer_files(settings.tokenizer_type, settings.tokenizer_model)
    config = TokenizerConfig(
        tokenizer_type=settings.tokenizer_type,
        tokenizer_model=settings.tokenizer_model,
        chat_template=settings.chat_template,
        pad_vocab_size=False,
    )
    try:
        with panics_as_errors():
            tokenizer = build_tokenizer(config)
    except Exception as error:  # the libraries behind it raise anything
        cause = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"cannot load --tokenizer-model {settings.tokenizer_model} as a {settings.tokenizer_type} ({cause}); "
            "copy its files again, or give another"
        ) from error
    if tokenizer.library == "huggingface":
        # Documents are cut later; transformers' warning about too long an input would only mislead.
        tokenizer._tokenizer.tokenizer.model_max_length = sys.maxsize
    if settings.eod_token is not None:
        _end_with(tokenizer, settings)
    identity_of(tokenizer)
    return tokenizer


def _end_with(tokenizer: MegatronTokenizerText, settings: TokenizerSettings) -> None:
    """Make another token of the vocabulary the one that ends documents."""
    if tokenizer.library != "huggingface":
        raise ValueError(
            f"--eod-token {settings.eod_token}: a SentencePiece model names its own end token; leave the flag out"
        )
    if settings.eod_token not in tokenizer._tokenizer.tokenizer.get_vocab():
        raise ValueError(
            f"--eod-token {settings.eod_token}: {settings.tokenizer_model} has no such token; give one that it has"
        )
    tokenizer._tokenizer.eos_token = settings.eod_token  # where the wrapper looks for `eod`


@lru_cache(maxsize=4)
def identity_of(tokenizer: MegatronTokenizerBase) -> TokenizerIdentity | None:
    """Return the identity of Megatron's tokenizer, computed once; None if it has no vocabulary.

    Raises:
        ValueError: transformers has loaded something else than what the tokenizer.json says.
    """
    if getattr(tokenizer, "library", None) in ("huggingface", "sentencepiece"):
        inner = tokenizer._tokenizer.tokenizer
        if tokenizer.library == "huggingface":
            return checked_identity(inner, tokenizer.eod)
        if not tokenizer._tokenizer.special_token_to_id:
            return identity_of_sentencepiece(inner, tokenizer.eod)
    try:
        vocabulary = {token: index for index, token in tokenizer.inv_vocab.items()}
    except (NotImplementedError, AttributeError):
        return None
    return TokenizerIdentity("words", vocabulary, {}, eod=tokenizer.eod)


def identify(tokenizer: MegatronTokenizerText) -> TokenizerStamp:
    """Return what a prepared set stores about its tokenizer. ValueError as in `identity_of`."""
    identity = identity_of(tokenizer)
    assert identity is not None, "every tokenizer that prepares has a vocabulary"
    return identity.stamp


@unprinted_panics()
def text_tokenizer(tokenizer: MegatronTokenizerText, stop_ids: tuple[int, ...] = ()) -> TextTokenizer:
    """Return the same tokenizer without Megatron's classes around it.

    Args:
        stop_ids: the model's, see `generation_stops`.

    Raises:
        ValueError: its ids are not the ids of Megatron's tokenizer, or it leaves out a text or fails on it.
    """
    inner = tokenizer._tokenizer  # the wrapper has no public name for the library's object
    make = {"huggingface": HuggingFaceText, "sentencepiece": SentencePieceText}[tokenizer.library]
    eod, bos = (-1 if token_id is None else token_id for token_id in (tokenizer.eod, tokenizer.bos))
    text = make(tokenizer.chat_template, eod, bos, stop_ids, inner.tokenizer)
    try:
        with panics_as_errors():
            _check_probes(tokenizer, text)
    except PanicError as error:
        raise ValueError(f"{_place(tokenizer)} cannot encode a text ({error}); copy it again") from error
    return text


def _check_probes(tokenizer: MegatronTokenizerText, text: TextTokenizer) -> None:
    """Refuse other ids than those of Megatron's tokenizer, and a tokenizer whose ids hold nothing of the text."""
    for probe in (PROBE, PROBE.strip(), "a"):
        ids = tokenizer.tokenize(probe)
        if text.ids(probe) != ids or text.text(ids) != tokenizer.detokenize(ids):
            raise ValueError(
                f"Megatron's {type(tokenizer._tokenizer).__name__} gives {probe!r} other ids than the library under "
                "it, which fdd prepare uses; install the version of Megatron in constraints.txt"
            )
    if not 0 < len(text.plain_ids(PROBE)) <= len(text.ids(PROBE)):
        raise ValueError(
            f"{_place(tokenizer)} leaves out the text that it is given: look at the normalizer and at the "
            '"single" of the post_processor in its tokenizer.json, or copy it again'
        )


def _place(tokenizer: MegatronTokenizerText) -> str:
    """Return for a message which tokenizer this is."""
    return f"--tokenizer-model {getattr(tokenizer._tokenizer.tokenizer, 'name_or_path', '(SentencePiece)')}"
