"""Identities of tokenizers in all their forms: a folder, a file, an object of transformers or SentencePiece."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_fdd.data.tokenizer_identity.identity import TokenizerIdentity
from megatron_fdd.host.field_kinds import shown
from megatron_fdd.host.json_file import read_json
from megatron_fdd.host.panics import panics_as_errors, unprinted_panics

if TYPE_CHECKING:  # a tokenizer's library is imported where the tokenizer is made
    import tokenizers
    from sentencepiece import SentencePieceProcessor
    from transformers import PreTrainedTokenizerBase

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
_PARTS = {
    "normaliser": "normalizer",
    "pre-tokenizer": "pre_tokenizer",
    "post-processor": "post_processor",
    "added tokens": "added_tokens",
}
# Entries of `model` that are compared elsewhere: the words are in the vocabulary.
_OWN_PLACE = ("vocab", "merges")


def has_tokenizer(folder: Path) -> bool:
    """Whether `identity_of_folder` finds a vocabulary in the folder.

    Raises:
        ValueError: what has the name of a tokenizer's file is no file. It would count as not there, without a word: a
            link into a cache that was cleaned, for example.
    """
    for name in TOKENIZER_FILES:
        path = folder / name
        if os.path.lexists(path) and not path.is_file():
            raise ValueError(
                f"{path} is no file (a link that leads nowhere, a pipe, a folder); fetch or copy the tokenizer again, "
                "or remove it"
            )
    return any((folder / name).is_file() for name in VOCABULARY_FILES)


def identity_of_folder(folder: Path) -> TokenizerIdentity:
    """Read an identity from a folder's tokenizer.json, tokenizer.model (SentencePiece), vocab.json or vocab.txt.

    Raises:
        ValueError: the folder holds none of these files, or one that cannot be read.
    """
    folder = Path(folder)
    if (folder / "tokenizer.json").is_file():
        identity = identity_of_file(folder / "tokenizer.json")
    elif (folder / "tokenizer.model").is_file():
        identity = identity_of_sentencepiece(_sentencepiece(folder / "tokenizer.model"))
    elif (folder / "vocab.json").is_file():
        identity = TokenizerIdentity("words", _ids(folder / "vocab.json"), {})
    elif (folder / "vocab.txt").is_file():
        lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
        identity = TokenizerIdentity("words", {token: index for index, token in enumerate(lines)}, {})
    else:
        raise ValueError(f"{folder} holds no tokenizer: none of {', '.join(VOCABULARY_FILES)}")
    return _with_added(identity, _added_beside(folder))


def identity_of_file(path: Path) -> TokenizerIdentity:
    """Return the identity of a tokenizer.json, by the library that the file is made for.

    Raises:
        ValueError: the file cannot be read.
    """
    import tokenizers

    content = read_json(path)
    model = content.get("model")
    if not isinstance(model, dict) or not model.get("vocab"):
        raise ValueError(f"{path} has no model.vocab")
    try:
        with panics_as_errors():
            backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower class
        raise ValueError(f"{path} cannot be read as a tokenizer ({error}); fetch it again") from error
    # transformers has both off for a text alone; a length of 2^40 would end the process.
    backend.no_padding()
    backend.no_truncation()
    return TokenizerIdentity(
        "tokenizers",
        backend.get_vocab(with_added_tokens=True),
        {token.content: index for index, token in backend.get_added_tokens_decoder().items()},
        lambda text: _encoded(backend, text, path),
        parts_of(content),
    )


def _encoded(backend: tokenizers.Tokenizer, text: str, path: Path) -> list[int]:
    """Return the ids of a text. ValueError if the file's parts do not fit together, which shows only now."""
    try:
        with panics_as_errors():
            return backend.encode(text, add_special_tokens=False).ids
    except Exception as error:  # the library raises no narrower class
        raise ValueError(f"{path} cannot encode a text ({error}); copy it again") from error


@unprinted_panics()
def encoded_by(library: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of texts, without the tokens around a whole sequence.

    Raises:
        ValueError: names the tokenizer and the first text that it cannot encode.
    """
    try:
        with panics_as_errors():
            return (
                list(library(list(texts), add_special_tokens=False, verbose=False)["input_ids"])
                if texts
                else []
            )
    except Exception as error:  # the library raises no narrower class
        if len(texts) > 1:
            for text in texts:
                encoded_by(library, [text])
        raise ValueError(
            f"the tokenizer of {library.name_or_path} cannot encode the text {shown(texts[0])} ({error}); leave that "
            "text out, or copy tokenizer.json again"
        ) from error


def identity_of_transformers(
    library: PreTrainedTokenizerBase, eod: int | None, *, parts: Mapping[str, str] | None = None
) -> TokenizerIdentity:
    """Return the identity of a tokenizer as transformers has loaded it.

    Args:
        parts: hashes from its own tokenizer.json (`parts_of`), if that has been read.
    """
    return TokenizerIdentity(
        "tokenizers" if library.is_fast else "python",
        library.get_vocab(),
        {token.content: index for index, token in library.added_tokens_decoder.items()},
        lambda text: encoded_by(library, [text])[0],
        parts or {},
        eod,
    )


def identity_of_sentencepiece(library: SentencePieceProcessor, eod: int | None = None) -> TokenizerIdentity:
    """Return the identity of a SentencePiece model.

    No token counts as added, because none is searched for in a text.
    """
    vocabulary = {library.id_to_piece(index): index for index in range(library.get_piece_size())}
    return TokenizerIdentity("sentencepiece", vocabulary, {}, library.encode_as_ids, {}, eod)


def parts_of(content: Mapping[str, Any]) -> dict[str, str]:
    """Return the hash of each part of a tokenizer.json except the words."""
    model = content.get("model") or {}
    parts = {name: content.get(key) for name, key in _PARTS.items()}
    merges = model.get("merges")
    parts["merges"] = [
        pair.split(" ") if isinstance(pair, str) else pair
        for pair in (merges if isinstance(merges, list) else [])
    ]
    parts["model"] = {key: value for key, value in model.items() if key not in _OWN_PLACE}
    return {name: _hash(value) for name, value in parts.items()}


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _sentencepiece(path: Path) -> SentencePieceProcessor:
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except RuntimeError:
        raise ValueError(f"{path} is not a SentencePiece model") from None


def _added_beside(folder: Path) -> dict[str, int]:
    """Return added tokens from the two files that may hold them beside the vocabulary."""
    added: dict[str, int] = {}
    if (folder / "tokenizer_config.json").is_file():
        decoder = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
        try:
            added |= {str(entry["content"]): int(index) for index, entry in decoder.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{folder / 'tokenizer_config.json'} has added_tokens_decoder: {shown(decoder)}, which must be an "
                'object of ids, each with its "content"; fetch the file again'
            ) from error
    if (folder / "added_tokens.json").is_file():
        added |= _ids(folder / "added_tokens.json")
    return added


def _ids(path: Path) -> dict[str, int]:
    """Return a JSON object of ids by token. ValueError names the file if an id is no whole number."""
    content = read_json(path)
    for token, index in content.items():
        if type(index) is not int or index < 0:
            raise ValueError(
                f"{path} has the id {shown(index)} for {shown(token)}, which must be a whole number"
            )
    return content


def _with_added(identity: TokenizerIdentity, beside: Mapping[str, int]) -> TokenizerIdentity:
    """Return an identity that also has the tokens that only the files beside the vocabulary name."""
    new = {token: index for token, index in beside.items() if token not in identity.vocabulary}
    if not new:
        return identity
    return TokenizerIdentity(
        identity.library,
        {**identity.vocabulary, **new},
        {**identity.added, **new},
        identity.encode,
        identity.parts,
        identity.eod,
    )
