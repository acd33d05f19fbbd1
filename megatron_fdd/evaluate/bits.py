"""Bits a byte: how well models with different tokenizers predict one text.

A perplexity counts tokens, and a tokenizer with larger tokens has fewer of them, each harder to predict. The bytes of a
text are the same for all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from megatron_fdd.data.tokenizer_identity import encoded_by
from megatron_fdd.evaluate.models import (
    NamedModel,
    Placement,
    begun,
    check_finite,
    leading_ids,
    num_positions,
)
from megatron_fdd.host.console import complain

# A text is scored in pieces, each by itself: the same bytes for all models, whatever context they take.
_PIECE = 1000
_MOST_PIECES = 32
# Prose, numbers, a list, a conversation and a program: enough to see that a model still works.
SAMPLE = """\
The old lighthouse stood at the end of the harbour wall, where the wind never rested. Every evening, shortly before
sunset, Martha climbed its 147 steps with a lamp in one hand and a book in the other. She had done so for thirty-two
years, ever since her father became too weak for the stairs. Ships no longer needed the light; their captains looked at
screens instead of the horizon. But the people of the town had asked her to keep it burning, and so she did.

Water boils at 100 degrees Celsius at sea level. At the top of a mountain the pressure of the air is lower, and so it
boils at about 70 degrees on the highest peak of the world. That is why rice takes longer to cook there.

What to buy for the weekend:
- two loaves of bread
- 500 g of butter and a dozen eggs
- apples, if they are not too expensive

"How long does a letter to Australia take?" she asked. "About ten days," said the clerk, "if nothing goes wrong."

def mean(values):
    \"\"\"Return the arithmetic mean of a list of numbers.\"\"\"
    if not values:
        raise ValueError("no values")
    return sum(values) / len(values)
"""


@dataclass(frozen=True, slots=True)
class BitsScore:
    """A model's score on a text.

    Attributes:
        bits: bits a byte.
        num_tokens: predicted tokens.
        num_bytes: bytes that these stand for.
    """

    bits: float
    num_tokens: int
    num_bytes: int


def compare_bits(folders: Sequence[Path], texts: Sequence[str], placement: Placement) -> list[BitsScore]:
    """Score the models of several folders, each with its own tokenizer, on the same pieces of texts.

    One model is in memory at a time. A long text is read in 32 pieces spread over it.

    Raises:
        ValueError: a folder does not load, a prediction is not a number, or there is no text.
    """
    models = [NamedModel(folder.resolve().name, folder) for folder in folders]
    for model in models:
        model.check()
    limits = [(model.tokenizer(), num_positions(model.config())) for model in models]
    pieces = cut_pieces(texts, limits)
    return [_score(model, pieces, placement) for model in models]


def cut_pieces(
    texts: Sequence[str], limits: Sequence[tuple[PreTrainedTokenizerBase, int | float]]
) -> list[str]:
    """Cut texts into pieces of at most 1,000 characters, or of less where that is too long for a model.

    Args:
        limits: each model's tokenizer, and how many tokens it takes.

    Raises:
        ValueError: there is no text.
    """
    length = _PIECE
    while True:
        pieces = [text[first : first + length] for text in texts for first in range(0, len(text), length)]
        pieces = [piece for piece in pieces if piece.strip()]
        if not pieces:
            raise ValueError("there is no text to score models on; give one")
        count = min(len(pieces), _MOST_PIECES)
        pieces = [pieces[index * len(pieces) // count] for index in range(count)]
        if length == 1 or all(
            len(_started(tokenizer, piece)) <= most for tokenizer, most in limits for piece in pieces
        ):
            return pieces
        length //= 2


def _started(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return a text's ids behind a token that begins it: the tokenizer's own, else the one that ends a text."""
    ids = encoded_by(tokenizer, [text])[0]
    end = tokenizer.eos_token_id
    return begun(ids, leading_ids(tokenizer) or ([end] if isinstance(end, int) else []))


@torch.inference_mode()
def _score(named: NamedModel, pieces: Sequence[str], placement: Placement) -> BitsScore:
    tokenizer = named.tokenizer()
    encoded = [_started(tokenizer, piece) for piece in pieces]
    named.check_ids(max(max(ids) for ids in encoded))
    model = placement.load(named.folder)
    nats, num_tokens, num_bytes, unknown = 0.0, 0, 0, 0
    for piece, ids in zip(pieces, encoded, strict=True):
        nats += _nats(model, ids)
        num_tokens += len(ids) - 1
        num_bytes += len(piece.encode())
        unknown += sum(number == tokenizer.unk_token_id for number in ids[1:])
    check_finite(model, math.isfinite(nats))
    if unknown:
        complain(
            f"warning: {named.folder}: its tokenizer does not know {unknown} of the text's {num_tokens} tokens, so "
            "that it has fewer bits a byte than are true"
        )
    return BitsScore(nats / math.log(2) / num_bytes, num_tokens, num_bytes)


def _nats(model: PreTrainedModel, ids: list[int]) -> float:
    """Return the sum of -log p of all tokens but the first; 0 of a text that its tokenizer leaves out."""
    if len(ids) < 2:
        return 0.0
    tokens = torch.tensor([ids], device=model.device)
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits.float()
    return cross_entropy(logits[0], tokens[0, 1:].to(logits.device), reduction="sum").item()
