"""The identity of a tokenizer: which token each id means, so that teacher and student can be compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from megatron_fdd.convert.hf_folder import copy_files, read_json, write_json

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
_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
IDENTITY_FILE = "fdd_tokenizer.json"
# How many differing ids a message names.
_SHOWN = 5


@dataclass(frozen=True)
class TokenizerIdentity:
    """What the ids of a tokenizer mean.

    Attributes:
        base: the trained vocabulary, token -> id.
        added: tokens added to it later (chat markers and the like), token -> id.
    """

    base: Mapping[str, int] = field(repr=False)
    added: Mapping[str, int] = field(repr=False)

    @property
    def num_tokens(self) -> int:
        """Size of the vocabulary with added tokens."""
        return len(self.base) + len(self.added)

    @cached_property
    def base_hash(self) -> str:
        """SHA-256 over the sorted (token, id) pairs of the base vocabulary."""
        pairs = json.dumps(sorted(self.base.items()), ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(pairs.encode("ascii")).hexdigest()


def tokenizer_identity(folder: Path) -> TokenizerIdentity:
    """Read it from a folder's tokenizer.json, tokenizer.model (SentencePiece), vocab.json or vocab.txt.

    Raises:
        ValueError: the folder holds none of them, or one that cannot be read.
    """
    folder = Path(folder)
    if (folder / "tokenizer.json").is_file():
        return _from_tokenizer_json(folder / "tokenizer.json")
    if (folder / "tokenizer.model").is_file():
        base = _sentencepiece_vocabulary(folder / "tokenizer.model")
    elif (folder / "vocab.json").is_file():
        base = read_json(folder / "vocab.json")
    elif (folder / "vocab.txt").is_file():
        lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
        base = {token: index for index, token in enumerate(lines)}
    else:
        raise ValueError(f"{folder} holds no tokenizer: none of {', '.join(_VOCABULARY_FILES)}")
    return TokenizerIdentity(base, _without(base, _added_beside(folder)))


def _without(base: Mapping[str, int], added: Mapping[str, int]) -> dict[str, int]:
    return {token: index for token, index in added.items() if token not in base}


def _from_tokenizer_json(path: Path) -> TokenizerIdentity:
    content = read_json(path)
    vocabulary = content.get("model", {}).get("vocab")
    if isinstance(vocabulary, list):  # Unigram: [token, score] in the order of ids
        base = {token: index for index, (token, _) in enumerate(vocabulary)}
    elif isinstance(vocabulary, dict):
        base = vocabulary
    else:
        raise ValueError(f"{path} has no model.vocab")
    added = {entry["content"]: entry["id"] for entry in content.get("added_tokens", [])}
    return TokenizerIdentity(base, _without(base, added))


def _sentencepiece_vocabulary(path: Path) -> dict[str, int]:
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except RuntimeError:
        raise ValueError(f"{path} is not a SentencePiece model") from None
    return {model.id_to_piece(index): index for index in range(model.get_piece_size())}


def _added_beside(folder: Path) -> dict[str, int]:
    """Added tokens of a slow tokenizer, from the two files that may hold them."""
    added: dict[str, int] = {}
    if (folder / "tokenizer_config.json").is_file():
        decoder = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
        added |= {entry["content"]: int(index) for index, entry in decoder.items()}
    if (folder / "added_tokens.json").is_file():
        added |= read_json(folder / "added_tokens.json")
    return added


def has_tokenizer(folder: Path) -> bool:
    """Whether `tokenizer_identity` finds a vocabulary in the folder."""
    return any((folder / name).is_file() for name in _VOCABULARY_FILES)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a model folder's tokenizer files into the folder `target`, with the identity beside them."""
    identity = tokenizer_identity(source)
    copy_files(TOKENIZER_FILES, source, target)
    write_json(target / IDENTITY_FILE, {"vocab_size": identity.num_tokens, "vocab_hash": identity.base_hash})


def compare_tokenizers(first: TokenizerIdentity, second: TokenizerIdentity) -> str | None:
    """None when both give every id of the base vocabulary the same token, else what differs.

    Other added tokens are an allowed difference, and so is another size because of them.
    """
    if first.base_hash == second.base_hash:
        return None
    token_of = [{index: token for token, index in side.base.items()} for side in (first, second)]
    ids = sorted(set(token_of[0]) | set(token_of[1]))
    differing = [index for index in ids if token_of[0].get(index) != token_of[1].get(index)]
    shown = ", ".join(
        f"{index}: {token_of[0].get(index)!r} / {token_of[1].get(index)!r}" for index in differing[:_SHOWN]
    )
    return (
        f"base vocabularies of {len(first.base)} and {len(second.base)} tokens; "
        f"{len(differing)} ids mean different tokens, first {shown}"
    )
