"""A copy of a model folder's tokenizer files that loads as tokenizer.json says."""

from __future__ import annotations

from pathlib import Path

from megatron_fdd.convert.hf_folder import copy_files
from megatron_fdd.data.tokenizer_identity import (
    TOKENIZER_FILES,
    TokenizerIdentity,
    difference_from_file,
    identity_of_folder,
    write_stamp,
)
from megatron_fdd.data.tokenizer_identity.own_file import PLAIN_CLASS
from megatron_fdd.host.console import complain
from megatron_fdd.host.disk import naming
from megatron_fdd.host.json_file import read_json, write_json
from megatron_fdd.host.panics import panics_as_errors, unprinted_panics

_CONFIG, _FILE = "tokenizer_config.json", "tokenizer.json"


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a model folder's tokenizer files into the folder `target`, with their identity beside them.

    Training reads the copy. If transformers would load it with a class that does not do what tokenizer.json says, the
    copy names a class that does, and a printed line says so. The copy has neither padding nor truncation.

    Raises:
        ValueError: the files cannot be read, or no class loads them as they say.
    """
    write_stamp(target, copy_loadable_tokenizer(source, target, "the checkpoint's copy in tokenizer/"))


@unprinted_panics()
def copy_loadable_tokenizer(source: Path, target: Path, copy: str) -> TokenizerIdentity:
    """Copy a model folder's tokenizer files as `copy_tokenizer` does, which calls them `copy`; return their identity.

    Raises:
        ValueError: as `copy_tokenizer`.
    """
    copy_files(TOKENIZER_FILES, source, target)
    with naming(target, source):
        return _loadable(source, target, copy)


def _loadable(source: Path, target: Path, copy: str) -> TokenizerIdentity:
    """Make a copy that is there load as it says, and return its identity."""
    if (target / _FILE).is_file():
        _drop_lengths(target / _FILE)
    identity, found = _load(target)
    if found is not None:
        config = read_json(target / _CONFIG) if (target / _CONFIG).is_file() else {}
        write_json(target / _CONFIG, {**config, "tokenizer_class": PLAIN_CLASS})
        identity, left = _load(target)
        if left is not None:
            raise ValueError(
                f"{source}: what transformers loads is not what its tokenizer.json says, with any class: {left}; make "
                "tokenizer_config.json and tokenizer.json agree"
            )
        complain(
            f"warning: {source}: its tokenizer does not load as its tokenizer.json says ({found}); {copy} "
            f"has the class {PLAIN_CLASS} and does: train with that one"
        )
    return identity


def _drop_lengths(file: Path) -> None:
    """Leave out padding and truncation.

    No text is padded or cut by its tokenizer here, and for a padding transformers adds a token that is searched for in
    every text.
    """
    content = read_json(file)
    if content.get("padding") or content.get("truncation"):
        write_json(file, {**content, "padding": None, "truncation": None})


def _load(folder: Path) -> tuple[TokenizerIdentity, str | None]:
    """Return the identity of what transformers loads, or else of the files, and its difference from tokenizer.json."""
    from transformers import AutoTokenizer

    try:
        with panics_as_errors():
            library = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a class may raise anything; a caller that needs it says more
        cause = next(iter(str(error).splitlines()), type(error).__name__)
        complain(f"warning: transformers cannot load this tokenizer, so only its files are known ({cause})")
        return identity_of_folder(folder), None
    return difference_from_file(library, library.eos_token_id)
