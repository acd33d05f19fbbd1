"""What of a model belongs to its vocabulary: tokenizer, number of rows, tokens with a role."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_fdd.convert.hf_companions import HF_FOLDER
from megatron_fdd.convert.hf_folder import CONFIG_FILES
from megatron_fdd.convert.token_bytes import TOKENIZER_FILE, TokenBytes
from megatron_fdd.data.tokenizer_identity import TOKENIZER_FOLDER
from megatron_fdd.host.checkpoint import TRACKER_FILE
from megatron_fdd.host.field_kinds import shown
from megatron_fdd.host.json_file import read_json
from megatron_fdd.host.model_fields import VOCABULARY

# Fields of config.json and generation_config.json for the tokens with a role, the most important first.
ROLES = ("eos_token_id", "bos_token_id", "unk_token_id", "pad_token_id")
_IN_CONFIGS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class VocabularySource:
    """Where a model's tokenizer and its configs lie.

    Attributes:
        tokenizer: a folder with `tokenizer.json`.
        configs: a folder that may have `config.json` and `generation_config.json`.
    """

    tokenizer: Path
    configs: Path

    @classmethod
    def find(cls, model: Path, flag: str) -> VocabularySource:
        """Find them in a Hugging Face folder, a folder with a tokenizer alone, or a Megatron checkpoint.

        Raises:
            ValueError: `model`, the value of `flag`, is no folder.
        """
        if not model.is_dir():
            raise ValueError(
                f"{flag} {model} is not a folder; give a Hugging Face model, or a checkpoint of fdd import"
            )
        if (model / TRACKER_FILE).is_file() and not (model / TOKENIZER_FILE).is_file():
            return cls(model / TOKENIZER_FOLDER, model / HF_FOLDER)
        return cls(model, model)

    @cached_property
    def tokens(self) -> TokenBytes:
        """The tokens. ValueError as in `TokenBytes.read`."""
        return TokenBytes.read(self.tokenizer)

    @cached_property
    def num_rows(self) -> int:
        """How many rows the model's embedding has, and at least one for each id of its tokenizer.

        Raises:
            ValueError: config.json has a `vocab_size` without a meaning.
        """
        size = self._config(CONFIG_FILES[0]).get("vocab_size", 1)
        if not VOCABULARY.fits(size):
            raise ValueError(
                f"{self.configs / CONFIG_FILES[0]} has vocab_size: {shown(size)}, which must be {VOCABULARY.words}; "
                "fetch it again"
            )
        return max(size, self.tokens.num_ids)

    @cached_property
    def roles(self) -> dict[str, int]:
        """The token of each of `ROLES` that the model has, in their order: as its tokenizer says, else config.json."""
        given = self._config(CONFIG_FILES[0])
        found = {}
        for role in ROLES:
            value = self._tokenizer_roles.get(role, given.get(role))
            first = value[0] if isinstance(value, list) and value else value
            if type(first) is int and 0 <= first < self.num_rows:
                found[role] = first
        return found

    def ids(self, file: str) -> dict[str, Any]:
        """Return the ids that `config.json` or `generation_config.json` has, or would have, for begin, end and padding.

        What the file does not say, the tokenizer's files say; null where neither does.
        """
        given = self._config(file if self.has(file) else CONFIG_FILES[0])
        return {role: given.get(role, self._tokenizer_roles.get(role)) for role in _IN_CONFIGS}

    def has(self, file: str) -> bool:
        """Whether the configs have this file."""
        return (self.configs / file).is_file()

    def _config(self, file: str) -> dict[str, Any]:
        """Return a config's fields; those of a text model within it are among them."""
        content = read_json(self.configs / file) if self.has(file) else {}
        within = content.get("text_config")
        return {**within, **content} if isinstance(within, dict) else content

    @cached_property
    def _tokenizer_roles(self) -> dict[str, int]:
        path = self.tokenizer / "tokenizer_config.json"
        config = read_json(path) if path.is_file() else {}
        found = {}
        for role in ROLES:
            token = config.get(role.removesuffix("_id"))
            name = token.get("content") if isinstance(token, dict) else token
            number = self.tokens.tokenizer.token_to_id(name) if isinstance(name, str) else None
            if number is not None:
                found[role] = number
        if self.tokens.unknown is not None:
            found.setdefault("unk_token_id", self.tokens.unknown)
        return found
