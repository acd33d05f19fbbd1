"""The probe: lines of text on which two tokenizers are compared, each aimed at one part of a tokenizer.

The first lines are the same for all tokenizers. The others consist of the tokenizer's own words, because a small
vocabulary knows few of the fixed ones, and because two sets of merges differ there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence

LINES = {
    "digits": "1 12 123 1234 12345 123456 1234567 12345678 123456789 3.14159 1,234,567.89 0x1f4a "
    "2024-05-17 12:30",
    "spaces": "  a b  c    d\te\t\tf        g  ",
    "line breaks": "a\nb\n\nc\r\nd\n\n\n\n  \n    e\n\tf \n\n",
    "case": "eBay mL NaOH pH iPhone HTTPServer getElementById SCREAMING_CASE snake_case McDonald",
    # Also at the start of a line: after a space most patterns take the apostrophe alone.
    "contractions": "'REALLY I'm you're he's we'll they'd I've don't I'M WE'LL DON'T it\u2019s\n'LLama 'twas "
    "you'REALLY o'clock",
    "punctuation": "a,b;c:d!e?f... --- *** ((x)) [[y]] {{z}} "
    "<div class=\"q\">'a'</div> a/b\\c @x #y $5 50% ^~`|&&==!=",
    "composed": "\u00e9 e\u0301 \u00c5 \u212b A\u030a \ufb01 \uff21\uff11 \u00bd \u00b2 na\u00efve cafe\u0301s",
    "scripts": "\u6771\u4eac\u90fd\u3001\u4eca\u65e5\u306f\u3002 "
    "\ud55c\uad6d\uc5b4 \u0627\u0644\u0633\u0644\u0627\u0645 "
    "\u05e9\u05dc\u05d5\u05dd \u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 "
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u03ba\u03b1\u03bb\u03b7\u03bc\u03ad\u03c1\u03b1",
    "emoji": "\U0001f642 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7 "
    "\u2764\ufe0f \U00020bb7 a\u200bb\u00a0c\u3000d",
    "control": "a\x01b\x07c\x1bd\x7fe\u2028f\u2029g\ufeffh",
    "long words": "Donaudampfschifffahrtsgesellschaft pneumonoultramicroscopic "
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa abcabcabcabc",
    "code": 'def f(x):\n    if x > 0:\n        return x ** 2  # square\n\n\tfor i in range(10): print(f"{i:>3}")\n',
}
_OWN_LINES = 8
_WORDS_A_LINE = 50


def probe_lines(token_of: Mapping[int, str], words: Collection[int]) -> dict[str, str]:
    """Return every line by its name.

    Args:
        token_of: the token of each id.
        words: the ids of tokens that were not added.
    """
    return {**LINES, **_own_lines(token_of, sorted(words))}


def added_line(token: str) -> str:
    """Return a text that shows whether an added token is found inside words, and which white space it includes."""
    return f"x {token} y{token}\n{token}  z"


def digest(ids: Sequence[int]) -> str:
    """Return a hash of the ids of one line; 64 bits are enough to see a difference."""
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()[:16]


def _own_lines(token_of: Mapping[int, str], words: Sequence[int]) -> dict[str, str]:
    """Return words evenly spaced over the vocabulary, as text; the same for all tokenizers with these words."""
    count = min(_OWN_LINES * _WORDS_A_LINE, len(words))
    chosen = [token_of[words[index * len(words) // count]] for index in range(count)]
    alphabet = _byte_alphabet() if any("\u0120" in token for token in chosen) else {}
    texts = [_as_text(token, alphabet) for token in chosen]
    return {
        f"own words {line + 1}": "".join(texts[line * _WORDS_A_LINE : (line + 1) * _WORDS_A_LINE])
        for line in range(-(-count // _WORDS_A_LINE))
    }


def _as_text(token: str, alphabet: Mapping[str, int]) -> str:
    """Return the text that a token stands for.

    The tokenizer's decoder is not used, because it may differ where the ids do not.
    """
    if alphabet and all(character in alphabet for character in token):
        return bytes(alphabet[character] for character in token).decode("utf-8", "ignore")
    return token.replace("\u2581", " ")


def _byte_alphabet() -> dict[str, int]:
    """Return the byte behind each character of a byte-level vocabulary; printable ones stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {
        **{chr(byte): byte for byte in printable},
        **{chr(256 + index): byte for index, byte in enumerate(others)},
    }
