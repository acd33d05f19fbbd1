"""The tokenizer of a model folder, made to give the ids that its tokenizer.json says."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_fdd.data.tokenizer_identity import TokenizerIdentity, difference_from_file
from megatron_fdd.host.console import complain
from megatron_fdd.host.panics import panics_as_errors, unprinted_panics


@lru_cache(maxsize=16)
@unprinted_panics()
def load_tokenizer(folder: Path, _fingerprint: str) -> tuple[PreTrainedTokenizerBase, TokenizerIdentity]:
    """Return a folder's own tokenizer and its identity, read once while its files (the fingerprint) stay the same.

    For some model types transformers builds the normaliser and the pre-tokenizer anew, whatever tokenizer.json has,
    and no flag prevents it. Then the file itself is loaded, with a warning: the student was trained on the file's
    ids.

    Raises:
        ValueError: the folder has no tokenizer, or none that gives the ids of its file.
    """
    try:
        with panics_as_errors():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the classes and the library behind them raise anything
        cause = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"{folder} has no tokenizer that loads ({cause}); copy its teacher's files into it"
        ) from error
    identity, difference = difference_from_file(tokenizer, tokenizer.eos_token_id)
    if difference is None:
        return tokenizer, identity
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    identity, left = difference_from_file(tokenizer, tokenizer.eos_token_id)
    if left is not None:
        raise ValueError(
            f"{folder}: what transformers loads is not what its tokenizer.json says: {left}; make "
            "tokenizer_config.json and tokenizer.json agree"
        )
    complain(f"warning: {folder}: tokenizer.json is loaded directly, because {difference}")
    return tokenizer, identity
