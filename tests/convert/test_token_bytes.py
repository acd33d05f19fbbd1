"""The bytes of tokens, and tokens of bytes, of both kinds of tokenizers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_fdd.convert.token_bytes import TokenBytes
from tests.convert.toy_vocabularies import write_byte_level, write_sentencepiece
from tests.data.tokenizer_identity import variants

TEXT = "the fox  quit\nIt's 1234 \u00e9\u6771 \U0001f642."


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> TokenBytes:
    return TokenBytes.read(write_byte_level(tmp_path_factory.mktemp("byte-level")))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> TokenBytes:
    return TokenBytes.read(write_sentencepiece(tmp_path_factory.mktemp("pieces")))


def test_the_tokens_of_a_text_are_its_bytes(byte_level: TokenBytes, pieces: TokenBytes) -> None:
    for tokens, before in ((byte_level, b""), (pieces, b" ")):  # SentencePiece puts a space first
        ids = tokens.tokenizer.encode(TEXT, add_special_tokens=False).ids
        assert b"".join(tokens.by_id[number] for number in ids) == before + TEXT.encode()
        assert tokens.pieces(before + TEXT.encode()) == ids or tokens is byte_level


def test_pieces_of_every_token_are_its_bytes(byte_level: TokenBytes, pieces: TokenBytes) -> None:
    """Also of tokens that are a part of a letter."""
    for first, second in ((byte_level, pieces), (pieces, byte_level)):
        assert any(data.decode(errors="ignore").encode() != data for data in first.by_id.values())
        for data in first.by_id.values():
            assert b"".join(second.by_id[number] for number in second.pieces(data)) == data


def test_a_byte_token_gives_way_to_a_piece(pieces: TokenBytes) -> None:
    byte, piece = (pieces.tokenizer.token_to_id(token) for token in ("<0x61>", "a"))
    assert pieces.by_id[byte] == pieces.by_id[piece] == b"a"
    assert pieces.by_bytes[b"a"] == piece
    assert pieces.is_idle(byte)
    assert not pieces.is_idle(piece)
    alone = pieces.tokenizer.token_to_id("<0x0A>")
    assert pieces.by_bytes[b"\n"] == alone
    assert not pieces.is_idle(alone)


def test_special_and_unknown_tokens_stand_for_no_bytes(byte_level: TokenBytes, pieces: TokenBytes) -> None:
    assert set(byte_level.special.values()) == set(variants.ADDED)
    assert pieces.special == {0: "<unk>", 1: "<s>", 2: "</s>"}
    assert pieces.unknown == 0
    for tokens in (byte_level, pieces):
        assert not tokens.special.keys() & tokens.by_id.keys()
        assert len(tokens.by_id) + len(tokens.special) == tokens.num_ids


def test_unknown_letters_are_no_piece(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE({"<unk>": 0, "\u2581": 1, "a": 2}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokens = TokenBytes.read(tmp_path)
    assert tokens.pieces("axa \u6771\ud800".encode(errors="surrogatepass")) == [2, 2, 1]


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no tokenizer.json; save its tokenizer with transformers'"):
        TokenBytes.read(tmp_path)
    Tokenizer(models.WordPiece({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="are neither byte-level as GPT-2's .* choose another model"):
        TokenBytes.read(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(ValueError, match="cannot be read as a tokenizer .* fetch it again"):
        TokenBytes.read(tmp_path)
    content = variants.variant(lambda content: content["model"]["vocab"].update(a=4_000_000_000))
    variants.write(tmp_path, content)
    with pytest.raises(ValueError, match=re.escape("the number of ids must be a whole number")):
        TokenBytes.read(tmp_path)
