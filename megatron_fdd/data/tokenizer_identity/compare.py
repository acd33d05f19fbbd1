"""The comparison of two tokenizers: are they the same, and if not, where do they first differ?

Two tokenizers are the same if every id that both have is the same token, added or not; if their tokens that were
not added are the same; and if both give the probe the same ids. Added tokens that only one of them has are allowed
while no data holds them. Decoder, class, padding side, template and the tokens put around a text do not matter,
because training reads ids.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from megatron_fdd.data.tokenizer_identity.identity import TokenizerIdentity, TokenizerStamp
from megatron_fdd.data.tokenizer_identity.probe import added_line, digest, probe_lines

# How many tokens, and how many characters of a probe line, a message shows.
_SHOWN_TOKENS = 3
_SHOWN_TEXT = 60
# Parts that may differ between tokenizers that are the same by the rule above.
_UNTOLD = ("added tokens", "post-processor")


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result of a comparison.

    Attributes:
        difference: the first reason why the tokenizers are not the same; None if they are.
        remarks: what differs or could not be compared without being a reason to refuse.
    """

    difference: str | None
    remarks: tuple[str, ...] = ()


def compare(
    first: TokenizerStamp | TokenizerIdentity,
    second: TokenizerIdentity,
    names: tuple[str, str] = ("the first", "the second"),
    *,
    with_added_texts: bool = True,
) -> Comparison:
    """Compare a tokenizer, in memory or stored, with one in memory.

    Args:
        names: names of both, for a sentence such as "id 5 is 'a' in NAME".
        with_added_texts: whether a text around an added token must give the same ids.
    """
    stamp = first if isinstance(first, TokenizerStamp) else first.stamp
    known = None if isinstance(first, TokenizerStamp) else first
    added = set(stamp.added.values())
    words = second.words(stamp.last_word, added)
    difference = _ids(known, stamp, second, words, names)
    if difference is not None:
        return Comparison(difference)
    if stamp.library != second.library or second.encode is None or not stamp.probe:
        kinds = f"{names[0]} is read by {stamp.library!r} and {names[1]} by {second.library!r}"
        return Comparison(None, (f"only the vocabularies were compared, as {kinds}",))
    difference = _probe(known, stamp, second, words, names)
    if difference is None and with_added_texts:
        difference = _added_texts(known, stamp, second, names)
    parts = [name for name in stamp.parts if second.parts.get(name, stamp.parts[name]) != stamp.parts[name]]
    if difference is not None:
        return Comparison(
            difference + (f" (parts of tokenizer.json that differ: {', '.join(parts)})" if parts else "")
        )
    told = [name for name in parts if name not in _UNTOLD]
    if told:
        remark = f"parts of tokenizer.json differ: {', '.join(told)}; both give a probe text the same ids"
        return Comparison(None, (remark,))
    return Comparison(None)


def _ids(
    known: TokenizerIdentity | None,
    stamp: TokenizerStamp,
    second: TokenizerIdentity,
    words: Collection[int],
    names: tuple[str, str],
) -> str | None:
    """Return an id that means two tokens, or a token with two ids, as a sentence."""
    if known is not None:
        both = known.token_of.keys() & second.token_of.keys()
        wrong = sorted(index for index in both if known.token_of[index] != second.token_of[index])
        if wrong:
            return _two_tokens(wrong[0], known.token_of[wrong[0]], second, names, len(wrong))
    for token, index in stamp.added.items():
        other = second.token_of.get(index)
        if other not in (None, token):
            return _two_tokens(index, token, second, names)
        if second.vocabulary.get(token) not in (None, index):
            return f"{token!r} is id {index} in {names[0]} and {second.vocabulary[token]} in {names[1]}"
    if second.words_sha256(words) != stamp.words_sha256:
        counts = f"{stamp.num_ids} ids in {names[0]}, {len(second.token_of)} in {names[1]}"
        return f"not all words are the same ({counts}; their hashes differ)"
    return None


def _two_tokens(
    index: int, token: str, second: TokenizerIdentity, names: tuple[str, str], count: int = 1
) -> str:
    more = f" ({count} ids mean different tokens)" if count > 1 else ""
    return f"id {index} is {token!r} in {names[0]} and {second.token_of[index]!r} in {names[1]}{more}"


def _probe(
    known: TokenizerIdentity | None,
    stamp: TokenizerStamp,
    second: TokenizerIdentity,
    words: Collection[int],
    names: tuple[str, str],
) -> str | None:
    """Return the first line of the probe that gets other ids, as a sentence."""
    assert second.encode is not None
    for name, text in probe_lines(second.token_of, words).items():
        ids = second.encode(text)
        if name in stamp.probe and stamp.probe[name] != digest(ids):
            return f'the probe line "{name}" gets other ids: {_where(known, second, text, ids, names)}'
    return None


def _added_texts(
    known: TokenizerIdentity | None,
    stamp: TokenizerStamp,
    second: TokenizerIdentity,
    names: tuple[str, str],
) -> str | None:
    """Return, as a sentence, the first added token that only one of them finds, or takes white space along with."""
    assert second.encode is not None
    expected = dict(stamp.added_probe)
    if known is not None and known.encode is not None:
        ours = (token for token in second.added if token in known.vocabulary.keys() - known.unfound)
        expected |= {token: digest(known.encode(added_line(token))) for token in ours}
    for token in sorted(expected.keys() & (second.vocabulary.keys() - second.unfound)):
        text = added_line(token)
        ids = second.encode(text)
        if digest(ids) != expected[token]:
            return f"text with the added token {token!r} gets other ids: {_where(known, second, text, ids, names)}"
    return None


def _where(
    known: TokenizerIdentity | None,
    second: TokenizerIdentity,
    text: str,
    ids: list[int],
    names: tuple[str, str],
) -> str:
    """Return both sides from the first differing token on; for a stored tokenizer only the text is known."""
    if known is None or known.encode is None:
        return (
            f"{_short(text)} is {_tokens(second, ids, 0)} in {names[1]}; only a hash is stored for {names[0]}"
        )
    theirs = known.encode(text)
    same = next((i for i, (a, b) in enumerate(zip(theirs, ids, strict=False)) if a != b), len(theirs))
    position = min(same, len(ids))
    return (
        f"{_short(text)} from token {position + 1} on is {_tokens(known, theirs, position)} in {names[0]} "
        f"and {_tokens(second, ids, position)} in {names[1]}"
    )


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_TEXT else text[:_SHOWN_TEXT] + "...")


def _tokens(identity: TokenizerIdentity, ids: list[int], position: int) -> str:
    shown = ids[position : position + _SHOWN_TOKENS]
    return " ".join(f"{index}:{identity.token_of.get(index)!r}" for index in shown) or "at its end"
