"""Which tokens of a sample are learned, compared with a count of bytes that does not ask a tokenizer for places.

The count follows the tokens' own spellings (bytes of a byte-level token, letters of a piece) along the text as the
tokenizer normalises it, so each token's bytes are known. A token is to be learned if all of its bytes are.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest
import sentencepiece
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from megatron_fdd.data.answers import Sample
from megatron_fdd.data.sample_tokens import encode_sample
from megatron_fdd.data.tokenizer import HuggingFaceText, SentencePieceText, TextTokenizer
from tests.data.conftest import sentences

CORPUS = [*sentences(100), "naïve e\u0301 café", "東京 🙂 🙂 東京", "a\n\nb\n\nc\n\nd", "it's\n\n\n\nso"]
SPECIAL = ["<|im_start|>", "<|im_end|>"]
# Texts at either border of what is learned; the last two share bytes or merge with others.
EDGES = [
    "There",
    "🙂",
    "e\u0301",
    "\u0301x",
    "東",
    "👩\u200d🚀",
    " so",
    "so ",
    "\n",
    "\n\n",
    "ï",
    "\u0301",
    "\u2009",
    "'s",
]
# Letters of GPT-2's byte-level alphabet, in the order of the bytes.
ALPHABET: dict[str, int] = {}
for _byte in range(256):
    _shown = chr(_byte)
    _is_plain = "!" <= _shown <= "~" or "¡" <= _shown <= "¬" or "®" <= _shown <= "ÿ"
    ALPHABET[_shown if _is_plain else chr(256 + sum(value > 255 for value in map(ord, ALPHABET)))] = _byte


def byte_level(*, nfc: bool = False, trim: bool = False, rstrip: bool = False) -> TextTokenizer:
    """Return byte-level BPE.

    `trim`: its places leave spaces out; `rstrip`: `<|im_end|>` includes white space after it.
    """
    bpe = Tokenizer(models.BPE())
    if nfc:
        bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(CORPUS, trainer)
    if trim:
        bpe.post_processor = processors.ByteLevel(trim_offsets=True)
    bpe.add_special_tokens([AddedToken(each, rstrip=rstrip, normalized=False) for each in SPECIAL])
    return HuggingFaceText(None, -1, -1, (), PreTrainedTokenizerFast(tokenizer_object=bpe))


def metaspace(scheme: str) -> TextTokenizer:
    """Return words that begin with ▁ in place of a space, and bytes for unknown letters."""
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    bpe.train_from_iterator(CORPUS[:50], trainers.BpeTrainer(vocab_size=450, special_tokens=words))
    bpe.add_special_tokens(SPECIAL)
    return HuggingFaceText(None, -1, -1, (), PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>"))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """Make a SentencePiece model that keeps `<|im_end|>` whole."""
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "corpus.txt").write_text("\n".join(sentences(200)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "model"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        user_defined_symbols=SPECIAL,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        num_threads=1,
    )
    library = sentencepiece.SentencePieceProcessor(model_file=str(folder / "model.model"))
    return SentencePieceText(None, -1, -1, (), library)


def spelled(tokenizer: TextTokenizer, token_id: int) -> bytes:
    """Return the bytes that a token stands for, as its vocabulary spells it."""
    if isinstance(tokenizer, SentencePieceText):
        token = tokenizer.library.id_to_piece(token_id)
    else:
        token = tokenizer.library.convert_ids_to_tokens([token_id])[0]
    if token in SPECIAL:
        return token.encode()
    if token.startswith("<0x"):
        return bytes([int(token[3:5], 16)])
    if isinstance(tokenizer, HuggingFaceText) and isinstance(
        tokenizer.library.backend_tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel
    ):
        return bytes(ALPHABET[letter] for letter in token)
    return token.replace("▁", " ").encode()


def counted(tokenizer: TextTokenizer, sample: Sample, ids: list[int], *, nfc: bool = False) -> list[int]:
    """Return the mask by counting bytes. Raises AssertionError if the spellings do not make up the text.

    A token is learned if its bytes are; white space after the end may belong to its last token (`swallows`).
    """
    units = letters(sample.text, nfc=nfc)
    spans = [unit[:2] for unit in units for _ in unit[2]]  # for each byte, its letter's characters
    data, mask, at = b"".join(unit[2] for unit in units), [], 0
    for number, token_id in enumerate(ids):
        spelling = spelled(tokenizer, token_id)
        if number == 0 and not data.startswith(spelling):
            spelling = spelling.removeprefix(b" ")  # put there by the tokenizer
        assert data.startswith(spelling, at)
        ours, at = spans[at : at + len(spelling)], at + len(spelling)
        if spelling.decode(errors="ignore") in swallowing(tokenizer):
            at = len(data) - len(data[at:].decode().lstrip().encode())
        mask.append(int(any(is_inside(ours, span, sample.text) for span in sample.learned)))
    assert at == len(data)
    return mask


def is_inside(places: list[tuple[int, int]], span: tuple[int, int], text: str) -> bool:
    """Whether a token at these characters belongs to a range; blanks at its end may lie outside."""
    first, last = span
    beyond = [text[start:end] for start, end in places if end > last]
    return bool(places) and first <= places[0][0] < last and all(letter.isspace() for letter in beyond)


def swallowing(tokenizer: TextTokenizer) -> set[str]:
    """Return the added tokens that include the white space after them."""
    if not isinstance(tokenizer, HuggingFaceText):
        return set()
    return {token.content for token in tokenizer.library.added_tokens_decoder.values() if token.rstrip}


def letters(text: str, *, nfc: bool) -> list[tuple[int, int, bytes]]:
    """Return where each letter begins and ends in the text, with its accents, and its bytes normalised."""
    if not nfc:
        return [(at, at + 1, letter.encode()) for at, letter in enumerate(text)]
    starts = [
        at
        for at, letter in enumerate(text)
        if not unicodedata.combining(letter)
        or unicodedata.is_normalized("NFC", text[max(at - 1, 0) : at + 1])
    ]
    return [
        (start, end, unicodedata.normalize("NFC", text[start:end]).encode())
        for start, end in pairwise([*starts, len(text)])
    ]


def samples() -> list[Sample]:
    """Return each edge at both borders, and two answers in one sample."""
    made = []
    rng = random.Random(0)
    for shift in range(0, len(EDGES), 3):
        for first, last in zip(EDGES, EDGES[shift:] + EDGES[:shift], strict=True):
            prompt = "<|im_start|>user\n" + rng.choice(EDGES) + "<|im_end|>\n<|im_start|>assistant\n"
            said = f"{first} near {last}<|im_end|>"
            text = prompt + said + "\n" + prompt + said
            second = len(prompt + said + "\n" + prompt)
            made.append(Sample(text, ((len(prompt), len(prompt + said)), (second, len(text)))))
    return made


KINDS: dict[str, Callable[[], TextTokenizer]] = {
    "byte level": byte_level,
    "byte level, trimmed places": lambda: byte_level(trim=True),
    "nfc": lambda: byte_level(nfc=True),
    "metaspace, first": lambda: metaspace("first"),
    "metaspace, never": lambda: metaspace("never"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_inside_a_learned_range_are_learned(kind: str) -> None:
    tokenizer = KINDS[kind]()
    for sample in samples():
        ids, mask, _ = encode_sample(tokenizer, sample)
        assert ids.tolist() == tokenizer.plain_ids(sample.text)
        assert mask.tolist() == counted(tokenizer, sample, ids.tolist(), nfc=kind == "nfc"), sample


def test_tokens_of_pieces(pieces: TextTokenizer) -> None:
    for sample in samples():
        ids, mask, _ = encode_sample(pieces, sample)
        assert mask.tolist() == counted(pieces, sample, ids.tolist()), sample


def check_borders_anywhere(tokenizer: TextTokenizer, *, nfc: bool = False) -> None:
    """Check ranges whose borders lie inside a word, or between a letter and its accent, as an author's marks may."""
    rng = random.Random(1)
    for _ in range(150):
        text = "x" + "".join(rng.choices([*EDGES, *SPECIAL], k=8))
        first, last = sorted(rng.sample(range(1, len(text) + 1), 2))
        sample = Sample(text, ((first, last),))
        ids, mask, _ = encode_sample(tokenizer, sample)
        assert mask.tolist() == counted(tokenizer, sample, ids.tolist(), nfc=nfc), sample


@pytest.mark.parametrize("kind", KINDS)
def test_borders_anywhere(kind: str) -> None:
    check_borders_anywhere(KINDS[kind](), nfc=kind == "nfc")


def test_borders_anywhere_between_pieces(pieces: TextTokenizer) -> None:
    check_borders_anywhere(pieces)


def learned_text(tokenizer: TextTokenizer, text: str) -> tuple[str, int]:
    """Return what is learned of `text`, with ranges in ⟦ ⟧, and how many tokens reach over a border."""
    first, last = text.index("⟦"), text.index("⟧") - 1
    sample = Sample(text.replace("⟦", "").replace("⟧", ""), ((first, last),))
    ids, mask, num_crossing = encode_sample(tokenizer, sample)
    return b"".join(spelled(tokenizer, each) for each in ids[mask == 1].tolist()).decode(), num_crossing


@pytest.mark.parametrize(
    ("text", "learned", "num_crossing"),
    [
        # The first two of three line breaks are one token of both prompt and answer, so it cannot be learned.
        ("assistant:\n⟦\n\nThere<|im_end|>⟧", "\nThere<|im_end|>", 1),
        ("assistant:\n⟦\nThere<|im_end|>⟧", "\nThere<|im_end|>", 0),
        ("assistant:\n⟦There<|im_end|>⟧", "There<|im_end|>", 0),
        # A space before the word belongs to the answer's first token; if it belongs to the prompt, it is not learned.
        ("assistant:⟦ so it is<|im_end|>⟧", " so it is<|im_end|>", 0),
        ("assistant: ⟦house it is<|im_end|>⟧", " it is<|im_end|>", 1),
        ("<|im_start|>⟦🙂 so 🙂⟧<|im_end|>", "🙂 so 🙂", 0),
        ("🙂⟦🙂⟧🙂", "🙂", 0),
    ],
)
@pytest.mark.parametrize("trim", [False, True])
def test_a_token_over_the_left_border_is_not_learned_and_counted(
    text: str, learned: str, num_crossing: int, trim: bool
) -> None:
    assert learned_text(byte_level(trim=trim), text) == (learned, num_crossing)


def test_an_end_that_swallows_the_line_break_behind_it_is_learned() -> None:
    tokenizer = byte_level(rstrip=True)
    text = "<|im_start|>user\nso<|im_end|>\n<|im_start|>assistant\n⟦so<|im_end|>⟧\n \n<|im_start|>user"
    assert learned_text(tokenizer, text) == ("so<|im_end|>", 0)
    # The header includes the answer's own line break.
    assert learned_text(tokenizer, "<|im_start|>⟦\nso<|im_end|>⟧\n") == ("so<|im_end|>", 1)
    for sample in samples():
        ids, mask, _ = encode_sample(tokenizer, sample)
        assert mask.tolist() == counted(tokenizer, sample, ids.tolist()), sample


@dataclass(frozen=True)
class Placeless(HuggingFaceText):
    """A tokenizer that tells no places, like one written in Python."""

    def ids_and_places(self, text: str) -> tuple[list[int], None]:
        """Return ids without places."""
        return self.plain_ids(text), None


def test_without_places_whole_tokens_are_learned_or_none() -> None:
    told = byte_level()
    assert isinstance(told, HuggingFaceText)
    tokenizer = Placeless(None, -1, -1, (), told.library)
    text = "<|im_start|>assistant\n⟦🙂 so 🙂<|im_end|>⟧\n"
    assert learned_text(tokenizer, text) == learned_text(told, text) == ("🙂 so 🙂<|im_end|>", 0)
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        learned_text(tokenizer, "assistant:\n⟦\n\nThere<|im_end|>⟧")
