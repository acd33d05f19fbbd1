"""The check that a tokenizer, as transformers loads it, gives the ids that its own tokenizer.json says.

Transformers takes a tokenizer's class from tokenizer_config.json or from the model type in config.json. Some
classes build the normaliser and the pre-tokenizer anew, whatever tokenizer.json has. The ids are then wrong,
without a warning.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_fdd.data.tokenizer_identity.compare import compare
from megatron_fdd.data.tokenizer_identity.identity import TokenizerIdentity
from megatron_fdd.data.tokenizer_identity.sources import identity_of_file, identity_of_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# With this class, and without config.json beside it, transformers loads tokenizer.json unchanged.
PLAIN_CLASS = "PreTrainedTokenizerFast"


def own_file(library: PreTrainedTokenizerBase) -> Path | None:
    """Return the tokenizer.json that the tokenizer was loaded from; None without one."""
    from transformers.utils import cached_file

    place = str(library.name_or_path)
    if Path(place).is_dir() or not place:
        path = Path(place) / "tokenizer.json"
        return path if place and path.is_file() else None
    try:
        found = cached_file(place, "tokenizer.json", local_files_only=True)
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found)


def difference_from_file(
    library: PreTrainedTokenizerBase, eod: int | None = None
) -> tuple[TokenizerIdentity, str | None]:
    """Return the identity of a loaded tokenizer, and its first difference from its own file; None if they agree.

    The flags of added tokens are not compared: tokenizer_config.json may overrule them.

    Raises:
        ValueError: the file cannot be read.
    """
    path = own_file(library)
    if path is None:
        return identity_of_transformers(library, eod), None
    of_file = identity_of_file(path)
    loaded = identity_of_transformers(library, eod, parts=of_file.parts)
    names = ("the file", f"what transformers loads as {type(library).__name__}")
    return loaded, compare(of_file, loaded, names, with_added_texts=False).difference


def checked_identity(library: PreTrainedTokenizerBase, eod: int | None = None) -> TokenizerIdentity:
    """Return the identity of a loaded tokenizer; refuse a tokenizer that differs from its file.

    Raises:
        ValueError: names the class, the first difference, and a folder that loads correctly.
    """
    identity, difference = difference_from_file(library, eod)
    if difference is not None:
        raise ValueError(
            f"{library.name_or_path} loads as {type(library).__name__}, which does not do what its tokenizer.json "
            f"says: {difference}. Use the tokenizer/ folder of a checkpoint that fdd import has made from it, or copy "
            'tokenizer.json and tokenizer_config.json to a folder without config.json and set "tokenizer_class": '
            f'"{PLAIN_CLASS}" there'
        )
    return identity
