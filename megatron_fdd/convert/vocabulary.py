"""A copy of a model folder's tokenizer files that loads as tokenizer.json says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
    copy names a class that does, and a printed line says so. All else is copied byte for byte, but for a padding or
    truncation that would change ids.

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
        _drop_lengths(source, target / _FILE, copy)
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


def _drop_lengths(source: Path, file: Path, copy: str) -> None:
    """Leave out a padding with a token that the file lacks, and a truncation that overlaps itself, and say so.

    No text is padded or cut by its tokenizer here. But transformers adds the token of a padding, and searches for it in
    every text; and it loads no such truncation.
    """
    content = read_json(file)
    wrong = {
        name: None
        for name, is_harmless in (("padding", _pads_with_own_token), ("truncation", _cuts_forwards))
        if content.get(name) and not is_harmless(content)
    }
    if wrong:
        write_json(file, {**content, **wrong})
        complain(
            f"warning: {source}: {' and '.join(wrong)} of its {_FILE} would change the ids of a text; {copy} has none"
        )


def _pads_with_own_token(content: dict[str, Any]) -> bool:
    """Whether the padding of a tokenizer.json has a token that is searched for in a text anyway."""
    padding, added = content["padding"], content.get("added_tokens")
    tokens = (
        [each.get("content") for each in added if isinstance(each, dict)] if isinstance(added, list) else []
    )
    return isinstance(padding, dict) and padding.get("pad_token") in tokens


def _cuts_forwards(content: dict[str, Any]) -> bool:
    """Whether each piece that the truncation of a tokenizer.json makes begins behind the beginning of the last one."""
    truncation = content["truncation"]
    if not isinstance(truncation, dict):
        return False
    stride, length = truncation.get("stride"), truncation.get("max_length")
    return isinstance(stride, int) and isinstance(length, int) and stride < length


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
