"""Tokenizers trained here, and small raw files."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_fdd.data.tokenizer import TokenizerSettings

TEXT = "the a small house stands near river where many children play and sing until night comes"
# The shape of ChatML: a closing token, then a line break that no model has to produce.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def sentences(count: int, seed: int = 0) -> list[str]:
    """Made-up sentences of 3 to 12 words, always the same."""
    rng = random.Random(seed)
    return [
        " ".join(rng.choices(TEXT.split(), k=rng.randint(3, 12))).capitalize() + "." for _ in range(count)
    ]


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer with a chat template and a padding token of its own."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator(sentences(200), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|endoftext|>",
        pad_token="<pad>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = CHATML
    folder = tmp_path_factory.mktemp("hf")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sp_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model."""
    folder = tmp_path_factory.mktemp("sp")
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(sentences(200)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "model"),
        vocab_size=120,
        model_type="bpe",
        byte_fallback=False,
        minloglevel=2,
        num_threads=1,
    )
    return folder / "model.model"


@pytest.fixture(scope="session")
def hf(hf_folder: Path) -> TokenizerSettings:
    return TokenizerSettings("HuggingFaceTokenizer", str(hf_folder))


@pytest.fixture(scope="session")
def sp(sp_model: Path) -> TokenizerSettings:
    return TokenizerSettings("SentencePieceTokenizer", str(sp_model))


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> str:
    """One JSON object a line; returns the path as a text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
