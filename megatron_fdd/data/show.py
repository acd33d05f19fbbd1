"""Samples to look at before a training run, with the learned text in colour, on a terminal and as a page."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from itertools import groupby

from megatron_fdd.data.encode import Encoded
from megatron_fdd.data.tokenizer import TextTokenizer

# Terminal colours: green for learned text, grey for text that is only read.
_LEARNED, _READ, _PLAIN = "\033[32m", "\033[90m", "\033[0m"
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
pre {{ white-space: pre-wrap; background: #f6f6f6; border-radius: 6px; padding: 1rem; color: #666 }}
b {{ font-weight: normal; color: #0a5c1f; background: #d7f5de; border-radius: 3px }}
</style></head><body><h1>{title}</h1>
<p><b>What is learned</b>, after what the student only reads.</p>
{samples}
</body></html>
"""


def shown(tokenizer: TextTokenizer, samples: Sequence[Encoded], *, in_colour: bool) -> Iterator[str]:
    """Yield each sample as a text; without colours the learned text stands between `[[` and `]]`."""
    before, after = (_LEARNED, _PLAIN) if in_colour else ("[[", "]]")
    for number, sample in enumerate(samples, 1):
        yield f"--- {_title(number, sample)}"
        parts = _parts(tokenizer, sample)
        read = (_READ, _PLAIN) if in_colour else ("", "")
        yield "".join(
            f"{before}{text}{after}" if is_learned else f"{read[0]}{text}{read[1]}"
            for text, is_learned in parts
        )


def page(tokenizer: TextTokenizer, samples: Sequence[Encoded], title: str) -> str:
    """Return the samples as an HTML page that needs no other files."""
    blocks = []
    for number, sample in enumerate(samples, 1):
        text = "".join(
            f"<b>{html.escape(part)}</b>" if is_learned else html.escape(part)
            for part, is_learned in _parts(tokenizer, sample)
        )
        blocks.append(f"<h2>{html.escape(_title(number, sample))}</h2>\n<pre>{text}</pre>")
    return _PAGE.format(title=html.escape(title), samples="\n".join(blocks))


def _title(number: int, sample: Encoded) -> str:
    learned = len(sample.ids) if sample.loss_mask is None else int(sample.loss_mask.sum())
    return (
        f"sample {number}: {len(sample.ids)} tokens, {learned} learned{', cut' if sample.truncated else ''}"
    )


def _parts(tokenizer: TextTokenizer, sample: Encoded) -> Iterator[tuple[str, bool]]:
    """Yield the text in pieces, each learned or not."""
    mask = [1] * len(sample.ids) if sample.loss_mask is None else sample.loss_mask.tolist()
    pairs = zip(sample.ids.tolist(), mask, strict=True)
    for is_learned, group in groupby(pairs, key=lambda pair: bool(pair[1])):
        yield tokenizer.text([token_id for token_id, _ in group]), is_learned
