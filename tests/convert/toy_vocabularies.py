"""A small SentencePiece tokenizer with byte tokens, and models for it and for a byte-level one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.convert import toys
from tests.data.tokenizer_identity import variants

# Merges of letters and SentencePiece's space; "qu" is in no word of the byte-level tokenizer.
_MERGES = [
    ("\u2581", "t"),
    ("h", "e"),
    ("\u2581t", "he"),
    ("o", "x"),
    ("q", "u"),
    ("\u2581", "f"),
    ("\u2581f", "ox"),
]
_LETTERS = "\u2581abcdefghijklmnopqrstuvwxyz.AO"


def write_sentencepiece(folder: Path, special: tuple[str, ...] = ("<unk>", "<s>", "</s>")) -> Path:
    """Make a folder with a tokenizer as Llama 2's: control tokens, 256 byte tokens, pieces."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *map("".join, _MERGES), *_LETTERS]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, _MERGES, byte_fallback=True, unk_token=special[0], fuse_unk=True)
    )
    tokenizer.add_special_tokens(list(special))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    parts = [
        decoders.Replace("\u2581", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = dict(zip(("unk_token", "bos_token", "eos_token"), special, strict=True))
    toys.write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **named})
    return folder


def write_byte_level(folder: Path, **config: Any) -> Path:
    """Make a folder with a tokenizer as GPT-2's and a template."""
    variants.write(folder, **config)
    (folder / "chat_template.jinja").write_text("byte-level")
    return folder


def make_student(folder: Path, variant: str = "plain", **changes: Any) -> Path:
    """Make a model with the SentencePiece tokenizer; its embedding has a row more than tokens."""
    toys.make_llama(folder, variant, tokenizer=False, **{"vocab_size": 298, **changes})
    return write_sentencepiece(folder)


def make_teacher(folder: Path, **config: Any) -> Path:
    """Make what is needed of a model with the byte-level tokenizer: its configs, for 500 rows."""
    write_byte_level(folder)
    ids = {"bos_token_id": None, "eos_token_id": 449}
    toys.write_json(folder / "config.json", {"model_type": "none", "vocab_size": 500, **ids, **config})
    toys.write_json(folder / "generation_config.json", {**ids, "eos_token_id": [449, 451], "top_p": 0.5})
    return folder
