"""Tokenizers trained here, and small raw files."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from unittest import mock

import pytest
import sentencepiece
from megatron.training.arguments import parse_args
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_fdd.data.encode import Encoded, EncodedDocument, Encoder, EncodeSettings
from megatron_fdd.data.megatron_tokenizer import load_tokenizer, text_tokenizer
from megatron_fdd.data.prepare import PrepareSettings, prepare
from megatron_fdd.data.tokenizer import TokenizerSettings

TEXT = "the a small house stands near river where many children play and sing until night comes"
# The form of ChatML: a closing token, then a line break that no model has to produce.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def sentences(count: int, seed: int = 0) -> list[str]:
    """Return made-up sentences of 3 to 12 words, always the same."""
    rng = random.Random(seed)
    return [
        " ".join(rng.choices(TEXT.split(), k=rng.randint(3, 12))).capitalize() + "." for _ in range(count)
    ]


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a byte-level BPE tokenizer with a chat template and a padding token of its own."""
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
    """Make a SentencePiece model."""
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


def make_encoder(settings: EncodeSettings) -> Encoder:
    """Return an encoder as `prepare` makes it."""
    return Encoder(settings, text_tokenizer(load_tokenizer(settings.tokenizer)))


def only_sample(document: EncodedDocument) -> Encoded:
    """Return the sample of a document that gives exactly one; raise its refusal."""
    if document.refusal is not None:
        raise document.refusal
    [sample] = document.samples
    return sample


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> str:
    """Write one JSON object in each line; return the path as a text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def megatron_args(*flags: str) -> argparse.Namespace:
    """Return Megatron's own namespace for these flags, with what its validation fills in."""
    common = ["--seq-length", "24", "--micro-batch-size", "2", "--eval-interval", "10", "--eval-iters", "1"]
    with mock.patch("sys.argv", ["x", *common, "--transformer-impl", "local", "--num-workers", "0", *flags]):
        args = parse_args()
    if args.data_path is not None and args.split is None:
        args.split = "969, 30, 1"
    args.dataloader_type, args.global_batch_size = "single", 4
    return args


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory, hf: TokenizerSettings) -> Path:
    """Prepare `text` and `instruction`: 60 and 40 documents."""
    folder = tmp_path_factory.mktemp("sets")
    text = write_jsonl(folder / "text.jsonl", [{"text": text} for text in sentences(60)])
    prepare(PrepareSettings((text,), str(folder / "text"), EncodeSettings(hf, "jsonl", append_eod=True)))
    rows = [{"prompt": a, "response": b} for a, b in zip(sentences(40, 1), sentences(40, 2), strict=True)]
    path = write_jsonl(folder / "instruction.jsonl", rows)
    encode = EncodeSettings(hf, "instruction", seq_length=24)
    prepare(PrepareSettings((path,), str(folder / "instruction"), encode))
    return folder
