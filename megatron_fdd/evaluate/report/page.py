"""The report as one HTML file and as Markdown."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from megatron_fdd.evaluate.report.facts import Facts, differs
from megatron_fdd.evaluate.report.pictures import Picture, color_of
from megatron_fdd.evaluate.report.runs import Run
from megatron_fdd.evaluate.report.scores import ScoreRow


@dataclass(frozen=True, slots=True)
class Report:
    """Everything on the page, in order.

    Attributes:
        made: when the report was made, in words.
    """

    runs: Sequence[Run]
    scores: Sequence[tuple[str, Sequence[ScoreRow]]]
    pictures: Sequence[Picture]
    facts: Sequence[tuple[str, Facts]]
    made: str

    @property
    def title(self) -> str:
        """The title, with the names of up to four runs."""
        names = [run.name for run in self.runs]
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        return f"Distillation report: {', '.join(names[:4])}{more}"


SCORE_NOTE = (
    "Bold: the best run of a row, if its lead over the second exceeds the spread of both. The teacher does not "
    "take part. Nothing is marked without a known spread, or where runs were not measured alike (other settings, "
    "layers, divergence or number of iterations). ± is the sample standard deviation: over seeds for ROUGE-L; for "
    "lm-eval it is the harness's standard error; for training values over the last 5 % of the iterations (100 at "
    "most), whose mean is shown. It says nothing about another run of the training."
)

_MARKDOWN = """\
# {{ report.title | text }}

{{ report.runs | length }} run{{ "s" if report.runs | length > 1 }}, {{ report.made }}.

{% for title, rows in report.scores %}
## {{ title }}

| |{% for run in report.runs %} {{ run.name | text }} |{% endfor %}

|---|{{ "--:|" * report.runs | length }}
{% for row in rows %}
| {{ row.name | text }} |{% for score in row.scores %} {{ cell(row, loop.index0) }} |{% endfor %}

{% endfor %}

{% endfor %}
{% if report.scores %}
{{ note | text }}

{% endif %}
{% for picture in report.pictures %}
## {{ picture.title | text }}

![{{ picture.alternative | text }}]({{ picture.name }}.png)

{{ picture.caption | text }}

{% endfor %}
{% for title, facts in report.facts %}
## {{ title }}

| |{% for run in report.runs %} {{ run.name | text }} |{% endfor %}

|---|{{ "---|" * report.runs | length }}
{% for name, values in facts %}
| {{ name | text }} |{% for value in values %} {{ value | text }} |{% endfor %}

{% endfor %}

{% endfor %}
"""

_HTML = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ report.title }}</title>
<style>
:root { --back: #f6f7f9; --card: #fff; --text: #1f2328; --soft: #59636e; --line: #d8dee4; --mark: #e6f4ea; }
@media screen and (prefers-color-scheme: dark) {
  :root { --back: #0d1014; --card: #15191f; --text: #dfe3e8; --soft: #98a2ad; --line: #2c333c; --mark: #17341f; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 24px 16px 48px; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 10px; }
p { margin: 0; }
.soft { color: var(--soft); font-size: .88rem; }
nav { margin: 12px 0 0; display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: .9rem; }
nav a { color: inherit; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px;
  margin-top: 18px; }
section .soft { margin-top: 10px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { padding: 6px 12px 6px 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
  overflow-wrap: anywhere; min-width: 6.5rem; }
tbody th { font-weight: 400; color: var(--soft); min-width: 11rem; }
thead th { white-space: nowrap; max-width: 20rem; overflow: hidden; text-overflow: ellipsis; }
.numbers td, .numbers thead th + th { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.numbers td.best { font-weight: 700; }
td.best span { background: var(--mark); border-radius: 4px; padding: 1px 5px; margin-right: -5px; }
tr.differs th { color: var(--text); font-weight: 600; }
.swatch { display: inline-block; width: .75em; height: .75em; border-radius: 2px; margin-right: .45em; }
picture, img { display: block; width: 100%; height: auto; }
@page { margin: 12mm; }
@media print {
  body { background: #fff; font-size: 11px; }
  main { max-width: none; padding: 0; }
  nav { display: none; }
  section { border: 0; padding: 0; margin-top: 14px; }
  figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
  .scroll { overflow: visible; }
  .swatch, td.best span { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
figure { margin: 0; }
</style>
</head>
<body>
<main>
<header>
<h1>{{ report.title }}</h1>
<p class="soft">{{ report.runs | length }} run{{ "s" if report.runs | length > 1 }}, {{ report.made }}.</p>
<nav>
{% for title in titles %}<a href="#{{ title | anchor }}">{{ title }}</a>
{% endfor %}</nav>
</header>
{% macro head() %}
<thead><tr><th></th>{% for run in report.runs %}<th scope="col" title="{{ run.name }}">
<span class="swatch" style="background:{{ color_of(run) }}"></span>{{ run.name }}</th>{% endfor %}</tr></thead>
{% endmacro %}
{% for title, rows in report.scores %}
<section id="{{ title | anchor }}">
<h2>{{ title }}</h2>
<div class="scroll"><table class="numbers">{{ head() }}
<tbody>
{% for row in rows %}
<tr><th scope="row">{{ row.name }}</th>{% for score in row.scores %}{% if row.best == loop.index0 %}
<td class="best"><span>{{ score }}</span></td>{% else %}<td>{{ "–" if score is none else score }}</td>{% endif %}
{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% if loop.last %}<p class="soft">{{ note }}</p>{% endif %}
</section>
{% endfor %}
{% for picture in report.pictures %}
<section id="{{ picture.title | anchor }}">
<h2>{{ picture.title }}</h2>
<figure>
<picture>
<source media="screen and (prefers-color-scheme: dark)" srcset="{{ picture.dark | inline }}">
<img alt="{{ picture.alternative }}" src="{{ picture.light | inline }}">
</picture>
{% if picture.caption %}<figcaption class="soft">{{ picture.caption }}</figcaption>{% endif %}
</figure>
</section>
{% endfor %}
{% for title, facts in report.facts %}
<section id="{{ title | anchor }}">
<h2>{{ title }}</h2>
<div class="scroll"><table>{{ head() }}
<tbody>
{% for name, values in facts %}
<tr{% if differs(values) %} class="differs"{% endif %}><th scope="row">{{ name }}</th>
{% for value in values %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
</section>
{% endfor %}
</main>
</body>
</html>
"""


def to_html(report: Report) -> str:
    """Return one HTML file that needs no other: pictures are inlined, and there are no scripts."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"inline": _inline, "anchor": _anchor}
    titles = [title for title, _ in report.scores] + [picture.title for picture in report.pictures]
    titles += [title for title, _ in report.facts]
    return environment.from_string(_HTML).render(
        report=report, note=SCORE_NOTE, titles=titles, color_of=color_of, differs=differs
    )


def to_markdown(report: Report) -> str:
    """Return Markdown with links to the picture files beside it."""
    # No HTML: see _plain.
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["text"] = _plain
    return environment.from_string(_MARKDOWN).render(report=report, note=SCORE_NOTE, cell=_markdown_cell)


def _markdown_cell(row: ScoreRow, position: int) -> str:
    score = row.scores[position]
    if score is None:
        return "–"
    return f"**{score}**" if row.best == position else str(score)


def _plain(text: str) -> str:
    """Return text that Markdown shows unchanged, on one line, also inside a table."""
    one_line = " ".join(text.split())
    escaped = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", one_line)
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _inline(png: bytes) -> Markup:
    return Markup("data:image/png;base64," + base64.b64encode(png).decode())


def _anchor(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")
