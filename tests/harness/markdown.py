"""The project's Markdown pages, as the tests read them that compare them with the code."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)
_INLINE_CODE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
# Code in bold quotes a message; FILE, if given, is the file of another package that prints it.
_QUOTE = re.compile(r"\*\*`([^`\n]+)`\*\*(?: in `([^`]+)`)?")


@dataclass(frozen=True)
class Page:
    """One Markdown file."""

    path: Path

    @property
    def name(self) -> str:
        """The path from the root of the checkout."""
        return str(self.path.relative_to(ROOT))

    @cached_property
    def text(self) -> str:
        """The whole text."""
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def prose(self) -> str:
        """The text without the fenced blocks."""
        return _FENCE.sub("", self.text)

    def blocks(self, language: str) -> list[str]:
        """Return the fenced blocks of a language."""
        return [body for name, body in _FENCE.findall(self.text) if name == language]

    @property
    def links(self) -> list[str]:
        """Link targets within the repository."""
        targets = _LINK.findall(_INLINE_CODE.sub("", self.prose))
        # Links whose text is code lost the text above, but not their target.
        return [target for target in targets if not re.match(r"[a-z]+:", target)]

    @property
    def inline_code(self) -> list[str]:
        """The inline code, without its backquotes."""
        return _INLINE_CODE.findall(self.prose)

    @cached_property
    def anchors(self) -> set[str]:
        """The anchors of the headings, as GitHub makes them."""
        found: set[str] = set()
        for heading in _HEADING.findall(self.prose):
            words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
            slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
            repeats = (f"{slug}-{number}" for number in range(1, 100))
            found.add(slug if slug not in found else next(each for each in repeats if each not in found))
        return found

    @property
    def quotes(self) -> list[tuple[str, str]]:
        """Quoted messages, each with the foreign file that prints it ("" for ours)."""
        return _QUOTE.findall(self.prose)


def pages(*patterns: str) -> list[Page]:
    """Return the files below the root that match, in order."""
    return [Page(path) for pattern in patterns for path in sorted(ROOT.glob(pattern))]
