"""Bits a byte against the plain definition."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_fdd.evaluate.bits import SAMPLE, compare_bits, cut_pieces
from megatron_fdd.evaluate.models import Placement
from tests.convert import toys
from tests.convert.toy_vocabularies import make_student, write_byte_level

FLOAT32 = Placement("cpu", "float32")
TEXT = "the fox quit. " * 2


def bits_by_definition(folder: Path, text: str, start: str) -> float:
    model, tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    ids = [tokenizer.convert_tokens_to_ids(start), *tokenizer(text, add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits.double().log_softmax(-1)[0]
    nats = -sum(float(log_probs[place, following]) for place, following in enumerate(ids[1:]))
    return nats / math.log(2) / len(text.encode())


def test_scores_equal_the_definition(tmp_path: Path) -> None:
    pieces = make_student(tmp_path / "pieces")
    toys.make_llama(tmp_path / "bytes", tokenizer=False, vocab_size=452)
    write_byte_level(tmp_path / "bytes")
    scores = compare_bits([pieces, tmp_path / "bytes"], [TEXT], FLOAT32)
    for score, folder, start in zip(scores, (pieces, tmp_path / "bytes"), ("</s>", "<|end|>"), strict=True):
        assert score.bits == pytest.approx(bits_by_definition(folder, TEXT, start), rel=1e-5)
        assert score.num_bytes == len(TEXT)
    assert scores[0].num_tokens != scores[1].num_tokens


def test_pieces_fit_the_shortest_model_and_spread_over_the_text(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_student(tmp_path / "student"))
    pieces = cut_pieces(["a" * 2500, "", "b" * 700], [(tokenizer, math.inf)])
    assert [len(piece) for piece in pieces] == [1000, 1000, 500, 700]
    short = cut_pieces(["".join(chr(97 + place // 1000) for place in range(20_000))], [(tokenizer, 64)])
    assert {len(piece) for piece in short} == {62}
    assert len(short) == 32
    assert [piece[0] for piece in short] == sorted(piece[0] for piece in short)
    assert {"a", "t"} <= {piece[0] for piece in short}
    assert 1000 < len(SAMPLE) < 2500
    with pytest.raises(ValueError, match="there is no text to score models on; give one"):
        cut_pieces([" \n"], [(tokenizer, 64)])


def test_letters_that_a_tokenizer_lacks_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = toys.make_llama(tmp_path / "student")
    compare_bits([folder], ["the q\u6771"], FLOAT32)
    assert "student: its tokenizer does not know 1 of the text's" in capsys.readouterr().err
