"""Does a tokenizer, as transformers has loaded it, give the ids that its own tokenizer.json says?

Transformers takes the class of a tokenizer from tokenizer_config.json or from the model type in config.json, and some
classes build normaliser and pre-tokenizer anew, whatever tokenizer.json has. The ids are then wrong without a word.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_fdd.data.tokenizer_identity.compare import compare
from megatron_fdd.data.tokenizer_identity.identity import TokenizerIdentity
from megatron_fdd.data.tokenizer_identity.sources import identity_of_file, identity_of_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# With this class, and no config.json beside it, transformers loads tokenizer.json as it stands.
PLAIN_CLASS = "PreTrainedTokenizerFast"


def own_file(library: PreTrainedTokenizerBase) -> Path | None:
    """The tokenizer.json that it was loaded from; None without one."""
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
    """The identity of a loaded tokenizer, and the first difference from its own file; None when they agree.

    The flags of added tokens are left out: tokenizer_config.json may overrule them.

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
    """The identity of a loaded tokenizer; refuse one that is not its file's.

    Raises:
        ValueError: names the class, the first difference, and a folder that loads rightly.
    """
    identity, difference = difference_from_file(library, eod)
    if difference is not None:
        raise ValueError(
            f"{library.name_or_path} loads as {type(library).__name__}, which does not do what its tokenizer.json "
            f"says: {difference}. Use the tokenizer/ folder of a checkpoint that fdd import has made of it, or copy "
            'tokenizer.json and tokenizer_config.json to a folder without config.json and set "tokenizer_class": '
            f'"{PLAIN_CLASS}" there'
        )
    return identity
