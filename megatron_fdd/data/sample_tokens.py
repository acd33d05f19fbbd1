"""From a sample's text to token ids and the mask of the tokens that are learned."""

from __future__ import annotations

import numpy as np

from megatron_fdd.data.answers import Sample
from megatron_fdd.data.tokenizer import TextTokenizer


def encode_sample(tokenizer: TextTokenizer, sample: Sample) -> tuple[np.ndarray, np.ndarray, int]:
    """Return ids (int32), mask (uint8), and how many tokens reach over a border of a learned range.

    The text is tokenised once, as a whole. A token is learned if its characters lie inside a range. A token that
    reaches over the left border (white space of the prompt that merges with the answer's) is not learned. A token
    that reaches over the right border is learned if only white space follows there: a control token that includes
    the line break.

    Raises:
        ValueError: the tokenizer does not tell the characters of a token, and a token reaches over a border.
    """
    token_ids, places = tokenizer.ids_and_places(sample.text)
    ids = np.array(token_ids, np.int32)
    mask = np.zeros(len(ids), np.uint8)
    if places is None:
        _mark_by_prefixes(tokenizer, sample, token_ids, mask)
        return ids, mask, 0
    starts, ends = _without_gaps(np.array(places, np.int64).reshape(-1, 2), sample.text)
    num_crossing = 0
    for first, last in sample.learned:
        mask[(starts >= first) & (ends <= last) & (starts < last)] = 1
        num_crossing += int(((starts < first) & (ends > first)).sum())
        for index in np.flatnonzero((starts >= first) & (starts < last) & (ends > last)):
            if sample.text[last : ends[index]].isspace():
                mask[index] = 1
            else:
                num_crossing += 1
    return ids, mask, num_crossing


def _without_gaps(places: np.ndarray, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Return where tokens begin and end, with the characters that a tokenizer leaves out of its places.

    A byte-level tokenizer may leave out the space before a word, although it is part of the word's token; a
    normaliser leaves out the accent that it joined with the letter before.
    """
    starts, ends = np.concatenate([places, [[len(text)] * 2]]).T  # the end of the text counts as a last token
    before = np.concatenate([[0], np.maximum.accumulate(places[:, 1])])
    for index in np.flatnonzero(starts > before):
        joined = len(text[before[index] : starts[index]].rstrip())
        starts[index] = before[index] + joined
        if joined:
            ends[:index][places[:index, 1] == before[index]] = starts[index]
    return starts[:-1], ends[:-1]


def _mark_by_prefixes(tokenizer: TextTokenizer, sample: Sample, ids: list[int], mask: np.ndarray) -> None:
    for first, last in sample.learned:
        before, after = (tokenizer.plain_ids(sample.text[:end]) for end in (first, last))
        if ids[: len(before)] != before or ids[: len(after)] != after:
            raise ValueError(
                "this tokenizer does not tell which characters a token stands for, and a token reaches over the "
                "border of an answer; use the tokenizer's tokenizer.json"
            )
        mask[len(before) : len(after)] = 1
