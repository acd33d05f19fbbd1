"""The identity of a tokenizer, for data, checkpoints, training and evaluation: is this the tokenizer that made it?

Imports neither torch nor Megatron; a tokenizer's library is imported only where such a tokenizer is read.
"""

from megatron_fdd.data.tokenizer_identity.compare import Comparison, compare
from megatron_fdd.data.tokenizer_identity.identity import FormerStamp, TokenizerIdentity, TokenizerStamp
from megatron_fdd.data.tokenizer_identity.own_file import checked_identity, difference_from_file
from megatron_fdd.data.tokenizer_identity.sources import (
    TOKENIZER_FILES,
    encoded_by,
    has_tokenizer,
    identity_of_file,
    identity_of_folder,
    identity_of_sentencepiece,
    identity_of_transformers,
)
from megatron_fdd.data.tokenizer_identity.start import without_second_start
from megatron_fdd.data.tokenizer_identity.stored import (
    TOKENIZER_FOLDER,
    check_copy,
    stored_identity,
    write_stamp,
)

__all__ = [
    "TOKENIZER_FILES",
    "TOKENIZER_FOLDER",
    "Comparison",
    "FormerStamp",
    "TokenizerIdentity",
    "TokenizerStamp",
    "check_copy",
    "checked_identity",
    "compare",
    "difference_from_file",
    "encoded_by",
    "has_tokenizer",
    "identity_of_file",
    "identity_of_folder",
    "identity_of_sentencepiece",
    "identity_of_transformers",
    "stored_identity",
    "without_second_start",
    "write_stamp",
]
