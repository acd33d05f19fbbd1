"""Scores of Hugging Face models against the plain definition, on tiny random models."""

import json
import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megatron_fdd.data.documents import RawDocument
from megatron_fdd.data.encode import Encoder, EncodeSettings
from megatron_fdd.data.megatron_tokenizer import load_tokenizer, text_tokenizer
from megatron_fdd.data.tokenizer import TokenizerSettings
from megatron_fdd.evaluate import perplexity

WORDS = ["<end>", "<unk>", "a", "b", "c", "d", "e"]


def tiny_model(seed: int, vocab_size: int = len(WORDS)) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {word: index for index, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", unk_token="<unk>")


def test_scores_equal_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = tiny_model(0), tiny_model(1)
    windows = torch.randint(len(WORDS), (5, 9), generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(perplexity, "_MAX_LOGITS", 2 * 8 * len(WORDS))  # 3 batches, the last one smaller

    scores = perplexity.score_models(teacher, {"student": student, "teacher": teacher}, windows)

    with torch.no_grad():
        log_p, log_q = (m(windows[:, :-1]).logits.double().log_softmax(-1) for m in (teacher, student))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    ce = -log_q.gather(-1, windows[:, 1:, None]).mean().item()
    assert scores["student"].kl_to_teacher == pytest.approx(kl, rel=1e-5)
    assert scores["student"].cross_entropy == pytest.approx(ce, rel=1e-5)
    assert scores["teacher"].kl_to_teacher == 0
    assert kl > 0.1
    alone = perplexity.score_models(None, {"student": student}, windows)["student"]
    assert alone.cross_entropy == scores["student"].cross_entropy
    assert math.isnan(alone.kl_to_teacher)


def test_what_is_no_number_is_refused_and_what_is_too_large_is_infinite() -> None:
    windows = torch.zeros(1, 3, dtype=torch.int64)
    broken = tiny_model(1)
    broken.lm_head.weight.data[3] = math.nan
    with pytest.raises(ValueError, match="predicts NaN"):
        perplexity.score_models(None, {"broken": broken}, windows)
    with pytest.raises(ValueError, match="predicts NaN"):
        perplexity.score_models(broken, {"student": tiny_model(2)}, windows)
    assert perplexity.PerplexityScore(800.0, math.nan).perplexity == math.inf


def test_windows_predict_every_token_once_and_close_documents() -> None:
    windows = perplexity.cut_windows(["a b c", "d e a b"], tiny_tokenizer(), length=4)
    assert windows.tolist() == [[2, 3, 4, 0, 5], [5, 6, 2, 3, 0]]
    assert len(perplexity.cut_windows(["a b c d e"] * 20, tiny_tokenizer(), 4, max_tokens=12)) == 3
    for texts, count in (["a b c"], 4), ([], 0):
        with pytest.raises(ValueError, match=f"{count} tokens, one window needs 9"):
            perplexity.cut_windows(texts, tiny_tokenizer(), length=8)


def test_texts_begin_and_end_as_in_training(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<unk>"
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 1)])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    texts = ["a b c", "d e <end>", "a b"]
    windows = perplexity.cut_windows(texts, tokenizer, length=12)
    settings = TokenizerSettings("HuggingFaceTokenizer", str(tmp_path / "tokenizer"))
    encoder = Encoder(
        EncodeSettings(settings, "jsonl", append_eod=True), text_tokenizer(load_tokenizer(settings))
    )
    taught: list[int] = []
    for text in texts:
        [encoded] = encoder(RawDocument("x", 1, json.dumps({"text": text}).encode(), 1)).samples
        taught += encoded.ids.tolist()
    assert windows.tolist() == [taught]
    assert taught[:6] == [1, 2, 3, 4, 0, 1]
    assert perplexity.encode_sample(tokenizer, "a") == [1, 2]
    assert perplexity.encode_sample(tokenizer, "") == [1]
    # A literal start token is the start; a later one belongs to the text.
    assert perplexity.encode_sample(tokenizer, "<unk> a <unk>") == [1, 2, 1]
    assert perplexity.cut_windows(["<unk> a", "b"], tokenizer, length=5).tolist() == [[1, 2, 0, 1, 3, 0]]
    with pytest.raises(ValueError, match="--prompt '' has no token"):
        perplexity.encode_sample(tiny_tokenizer(), "")


def test_unigram_is_the_smoothed_frequency() -> None:
    training = torch.tensor([[0, 2, 2, 3]])  # the first token of a window is not predicted
    cross_entropy = perplexity.unigram_cross_entropy(training, torch.tensor([[0, 2]]), vocab_size=4)
    assert cross_entropy == pytest.approx(-torch.tensor(3 / 7).log().item())


def test_malformed_text_names_the_line(tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    for line, message in (
        (b'{"txt": "b"}', "the field 'text' is missing"),
        (b'{"text": null}', "the field 'text' is a NoneType, not a text"),
        (b'{"text": "\xff"}', "byte 0xff is not UTF-8"),
        (b"[]", "a JSON list"),
    ):
        file.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n' + line + b"\n")
        with pytest.raises(ValueError, match=rf"text\.jsonl, line 3: {message}.*; give JSON lines"):
            perplexity.read_texts(file)
    file.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n{"text": " "}\n')
    assert perplexity.read_texts(file) == ["a"]
