"""Which tokenizers are the same, and what is said about those that are not."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_fdd.data.tokenizer_identity import (
    Comparison,
    FormerStamp,
    TokenizerIdentity,
    TokenizerStamp,
    compare,
    identity_of_folder,
)
from tests.data.tokenizer_identity import variants
from tests.data.tokenizer_identity.variants import Content

# The change; the line of the probe (or another first difference) that shows it; the part of tokenizer.json.
DIFFERENT: dict[str, tuple[Callable[[Content], object], str, str | None]] = {
    "GPT-2's split": (
        lambda content: content.update(
            pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        ),
        'line "',
        "pre-tokenizer",
    ),
    "one digit at a time": (variants.with_pattern(variants.ONE_DIGIT), 'line "digits"', "pre-tokenizer"),
    "small contractions": (
        variants.with_pattern(variants.SMALL_CONTRACTIONS),
        'line "contractions"',
        "pre-tokenizer",
    ),
    "no NFC": (lambda content: content.update(normalizer=None), 'line "composed"', "normaliser"),
    "NFKC": (lambda content: content.update(normalizer={"type": "NFKC"}), 'line "', "normaliser"),
    "prefix space": (
        lambda content: content["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
        'line "',
        "pre-tokenizer",
    ),
    "fewer merges": (lambda content: content["model"].update(merges=content["model"]["merges"][:50]), "", "merges"),
    "a merge missing": (
        lambda content: content["model"]["merges"].remove(["Ġspac", "es"]), 'line "own words', "merges"
    ),
    "words swapped": (variants.swap_words, "id 300 is '.*' in the first and '.*' in the second .2 ids mean", None),
    "added token strips": (
        variants.flag_added("<|im_end|>", rstrip=True),
        "added token '<.im_end.>' gets other ids",
        "added tokens",
    ),
    "added token renamed": (
        variants.rename_added("<|im_end|>", "<|User|>"),
        r"id \d+ is '<.im_end.>' in the first and '<.User.>' in the second",
        None,
    ),
    "added tokens swapped": (
        lambda content: (
            variants.rename_added("<|im_end|>", "x")(content),
            variants.rename_added("<|im_start|>", "<|im_end|>")(content),
            variants.rename_added("x", "<|im_start|>")(content),
        ),
        r"id \d+ is '<.im_start.>' in the first and '<.im_end.>' in the second .2 ids",
        None,
    ),
}  # fmt: skip
# The change, and the part that a remark names; None: there is no remark.
SAME: dict[str, tuple[Callable[[Content], object], str | None]] = {
    "itself": (lambda content: None, None),
    "merges swapped": (variants.swap_unrelated_merges, "merges"),
    "an added token missing": (variants.drop_added, None),
    "an added token more": (variants.add_added, None),
    "not special": (variants.flag_added("<|im_end|>", special=False), None),
    "a start token put before": (
        lambda content: content.update(
            post_processor={
                "type": "TemplateProcessing",
                "single": [
                    {"SpecialToken": {"id": "<|end|>", "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}},
                ],
                "pair": [],
                "special_tokens": {"<|end|>": {"id": "<|end|>", "ids": [300], "tokens": ["<|end|>"]}},
            }
        ),
        None,
    ),
    "without decoder": (lambda content: content.update(decoder=None), None),
}


def identities(
    folder: Path, change: Callable[[Content], object]
) -> tuple[TokenizerIdentity, TokenizerIdentity]:
    other = variants.write(folder / "other", variants.variant(change))
    return identity_of_folder(variants.write(folder / "base")), identity_of_folder(other)


def both_ways(first: TokenizerIdentity, second: TokenizerIdentity) -> list[Comparison]:
    return [compare(one, other) for one, other in ((first, second), (second, first))]


@pytest.mark.parametrize("name", DIFFERENT)
def test_the_first_difference_is_named(name: str, tmp_path: Path) -> None:
    change, pattern, part = DIFFERENT[name]
    first, second = identities(tmp_path, change)
    found = compare(first, second)
    assert found.difference is not None
    assert re.search(pattern, found.difference), found.difference
    assert part is None or f"parts of tokenizer.json that differ: {part}" in found.difference
    assert compare(second, first).difference is not None
    # A stored tokenizer has only hashes, and is refused too.
    assert compare(first.stamp, second).difference is not None
    assert compare(second.stamp, first).difference is not None


@pytest.mark.parametrize("name", SAME)
def test_what_makes_no_difference(name: str, tmp_path: Path) -> None:
    change, part = SAME[name]
    first, second = identities(tmp_path, change)
    for found in [*both_ways(first, second), compare(first.stamp, second), compare(second.stamp, first)]:
        assert found.difference is None
        assert [part is not None and part in remark for remark in found.remarks] == [True] * (
            part is not None
        )


def test_a_message_has_both_sides(tmp_path: Path) -> None:
    first, second = identities(tmp_path, variants.with_pattern(variants.ONE_DIGIT))
    [one, two, twelve] = [first.vocabulary[token] for token in ("1", "2", "12")]
    found = compare(first, second, ("the teacher", "the student"))
    assert found.difference is not None
    for part in (
        'the probe line "digits" gets other ids: \'1 12 123',
        f"from token 3 on is {twelve}:'12' ",
        f" in the teacher and {one}:'1' {two}:'2' ",
        " in the student (parts of tokenizer.json that differ: pre-tokenizer)",
    ):
        assert part in found.difference
    found = compare(first.stamp, second, ("the teacher", "the student"))
    assert found.difference is not None
    assert re.search(
        r'line "digits" .* in the student; only a hash is stored for the teacher', found.difference
    )


def test_a_stamp_survives_its_file_and_is_small(tmp_path: Path) -> None:
    identity = identity_of_folder(variants.write(tmp_path))
    text = json.dumps(dataclasses.asdict(identity.stamp))
    stamp = TokenizerStamp(**json.loads(text))
    assert stamp == identity.stamp
    assert len(text) < 3000
    assert stamp.added == {token: stamp.last_word + 1 + place for place, token in enumerate(variants.ADDED)}
    assert (stamp.smallest_id, stamp.largest_id) == (0, stamp.num_ids - 1)
    assert compare(stamp, identity) == Comparison(None)


def test_words_are_the_same_whether_they_count_as_added_or_not(tmp_path: Path) -> None:
    """One file lists control tokens as added, another has them among its words."""
    whole = identity_of_folder(variants.write(tmp_path))
    words = TokenizerIdentity("words", whole.vocabulary, {})
    for found in both_ways(whole, words):
        assert found.difference is None
        assert "only the vocabularies were compared" in found.remarks[0]
    assert compare(whole.stamp, words).difference is None
    fewer = TokenizerIdentity("words", {"a": 0}, {})
    assert compare(words.stamp, fewer).difference is not None
    assert compare(words, fewer).difference is not None


def test_a_token_with_two_ids_is_named() -> None:
    first = TokenizerIdentity("words", {"a": 0, "<x>": 1}, {"<x>": 1})
    second = TokenizerIdentity("words", {"a": 0, "<y>": 5, "<x>": 3}, {"<y>": 5, "<x>": 3})
    for found in both_ways(first, second):
        assert found.difference is not None
        assert re.search(r"'<x>' is id \d in the first and \d in the second", found.difference)


def test_what_an_older_version_stamped_is_compared_by_its_hash(tmp_path: Path) -> None:
    identity = identity_of_folder(variants.write(tmp_path / "now"))
    lines = "".join(f"{index}\t{token!r}\n" for index, token in sorted(identity.token_of.items()))
    stamp = FormerStamp(len(identity.token_of), 3, hashlib.sha256(lines.encode()).hexdigest())
    assert stamp.matches(identity)
    later = identity_of_folder(variants.write(tmp_path / "later", variants.variant(variants.add_added)))
    assert stamp.matches(later)
    other = identity_of_folder(variants.write(tmp_path / "other", variants.variant(variants.swap_words)))
    assert not stamp.matches(other)
