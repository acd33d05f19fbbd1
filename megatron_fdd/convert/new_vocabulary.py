"""A model's embeddings and head for another model's tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from megatron_fdd.convert.families import family_of
from megatron_fdd.convert.hf_folder import HfFolder
from megatron_fdd.convert.token_bytes import TokenBytes
from megatron_fdd.host.json_file import read_json

# Tokens with a role, as a config.json or generation_config.json names them.
_ROLES = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "sep_token_id")
GENERATION_FILE = "generation_config.json"


@dataclass(frozen=True)
class NewVocabulary:
    """For each token of the new vocabulary, the old tokens whose rows it starts from.

    Attributes:
        folder: the model whose vocabulary it is; its tokenizer, template and special tokens are taken.
        origins: old ids of each new id, in the order of the text; empty: the mean of all old rows.
        num_same: new tokens that stand for the same bytes as an old one, or are the same special token.
    """

    folder: Path
    origins: Sequence[Sequence[int]]
    num_same: int

    @classmethod
    def between(cls, old: Path, new: Path) -> NewVocabulary:
        """Compare the tokenizers of two model folders.

        A token of text is an old token of the same bytes, or else the pieces into which the old model cuts its bytes. A
        special token is an old one of the same name, or else of the same role (end, begin, padding), or else the
        pieces of its name.

        Raises:
            ValueError: a folder has no model, or no tokenizer that can be compared.
        """
        folder = HfFolder(new)
        rows = family_of(folder.config).megatron_args(folder.config)["vocab_size"]
        mine, theirs = TokenBytes.read(old), TokenBytes.read(new)
        if len(theirs) > rows:
            raise ValueError(
                f"{new}: its tokenizer has {len(theirs)} ids and its config.json a vocab_size of {rows}: copy the model "
                "again"
            )
        known = len(mine.tokenizer.get_vocab())
        if not known:
            raise ValueError(f"{old}: its tokenizer has no token; copy the model again")
        roles = _roles(old, new)
        origins, num_same = [], 0
        for number in range(rows):
            same = _same(number, mine, theirs, roles)
            num_same += same is not None
            if same is not None:
                origins.append([same])
            else:
                name = theirs.special.get(number)
                data = theirs.by_id.get(number, b"") if name is None else name.encode()
                origins.append(mine.pieces(data))
        return cls(new, origins, num_same)

    def rows_of(self, old_VX: Tensor) -> Tensor:
        """Return a tensor of the new vocabulary, of the dtype of the old one: embeddings, a head, or its bias.

        A token with several origins starts from their mean, computed in float32.
        """
        flat = old_VX.float().flatten(1)
        counts = torch.tensor([len(origin) for origin in self.origins])
        offsets = counts.cumsum(0) - counts
        ids = torch.tensor([number for origin in self.origins for number in origin])
        found = embedding_bag(ids, flat, offsets, mode="mean")
        found[counts == 0] = flat.mean(0)
        return found.reshape(len(self.origins), *old_VX.shape[1:]).to(old_VX.dtype)

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return a config.json with this vocabulary and its special tokens."""
        theirs = HfFolder(self.folder).config
        kept = {name: value for name, value in config.items() if name not in _ROLES}
        return {
            **kept,
            "vocab_size": len(self.origins),
            **{name: theirs[name] for name in _ROLES if name in theirs},
        }


def _same(number: int, old: TokenBytes, new: TokenBytes, roles: Mapping[int, int]) -> int | None:
    """Return the old token that stands for the same as a new one; None if there is none."""
    if number in new.special:
        found = old.tokenizer.token_to_id(new.special[number])
        return roles.get(number) if found is None else found
    return old.by_bytes.get(new.by_id[number]) if number in new.by_id else None


def _roles(old: Path, new: Path) -> dict[int, int]:
    """Return the old token of the same role for each new one that has a role."""
    mine, theirs = _named(old), _named(new)
    return {number: mine[role] for role, number in reversed(theirs.items()) if role in mine}


def _named(folder: Path) -> dict[str, int]:
    """Return the tokens of a folder that have a role; where several have it, the first."""
    values: dict[str, Any] = {}
    for name in ("config.json", GENERATION_FILE):
        if (folder / name).is_file():
            values |= {key: value for key, value in read_json(folder / name).items() if key in _ROLES}
    first = {role: value[0] if isinstance(value, list) and value else value for role, value in values.items()}
    return {role: first[role] for role in _ROLES if isinstance(first.get(role), int)}
