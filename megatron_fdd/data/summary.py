"""The lines that preparing prints at its end: what there is to learn, what is unusual, what was left out and why."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_fdd.data import chat, encode
from megatron_fdd.data.chat_template import ChatTemplate
from megatron_fdd.data.tally import Tally

_SHOWN_PREAMBLE = 80
_BAR = 40


def summary_lines(tally: Tally, template: ChatTemplate | None) -> list[str]:
    """Return the summary, for people; the first line has the counts.

    Args:
        template: the template of the conversations; None without conversations.
    """
    share = f", {tally.learned:,} of them learned ({tally.learned / max(tally.tokens, 1):.0%})"
    lines = [
        f"{tally.documents:,} documents, {tally.tokens:,} tokens{share if tally.learned < tally.tokens else ''}"
    ]
    if tally.notes[chat.ANSWERS] and template is not None:
        lines += _of_chats(tally, template)
    lines += _histogram(tally)
    if tally.notes[encode.EMPTY_DOCUMENTS]:
        lines.append(f"{tally.notes[encode.EMPTY_DOCUMENTS]:,} empty documents left out")
    if tally.truncated:
        lines.append(f"{tally.truncated:,} samples cut to --seq-length")
    return [*lines, *refusal_lines(tally)]


def _of_chats(tally: Tally, template: ChatTemplate) -> Iterator[str]:
    notes = tally.notes
    if notes[chat.REWRITTEN]:
        cost = tally.tokens / max(notes[encode.LAST_SAMPLES], 1)
        yield (
            f"{tally.documents:,} conversations -> {tally.samples:,} samples, {cost:.1f} times the tokens: the "
            "template writes earlier answers differently once a conversation goes on, so each has its own sample "
            "(--chat-turns last learns only the last one)"
        )
    for note, count in sorted(notes.items()):
        token = note.removeprefix(chat.ENDS_WITH)
        if token == note or not token:
            continue
        yield f"{count:,} answers end with {token}, which is learned"
        if token not in template.stop_tokens:
            known = ", ".join(sorted(template.stop_tokens)) or "none"
            yield (
                f"  the tokenizer's folder does not name {token} as an end (it names: {known}): a student that ends a "
                "generation there needs its id under eos_token_id in generation_config.json"
            )
    if template.preamble.strip():
        yield f"without a system text the template itself begins with {template.preamble[:_SHOWN_PREAMBLE]!r}"
    if template.uses_date:
        yield f"the template writes the date: {template.date} (--chat-date)"
    for note in (encode.LEFT_OUT, encode.PAIRS):
        if notes[note]:
            yield f"{notes[note]:,} {note}"
    if notes[chat.MARKS_ALONE]:
        yield (
            f"{notes[chat.MARKS_ALONE]:,} answers do not follow their generation prompt: only the template's marks "
            "show where they are, and the student learns them after another text than it will see"
        )
    if notes[chat.EMPTY_THINKING]:
        yield (
            f"{notes[chat.EMPTY_THINKING]:,} answers begin with empty reasoning, which is learned: the "
            "student learns not to think. Give answers with reasoning, or ask for none with --chat-template-kwargs "
            "'{\"enable_thinking\": false}', where the template has that switch"
        )
    ignored = {
        note.removeprefix(encode.UNKNOWN_FIELD): count
        for note, count in sorted(notes.items())
        if note.startswith(encode.UNKNOWN_FIELD)
    }
    if ignored:
        names = ", ".join(f"{name} ({count:,})" for name, count in ignored.items())
        yield f"fields that nothing reads (number of records): {names}"
    if notes[chat.CONTROL_TOKENS]:
        yield f"{notes[chat.CONTROL_TOKENS]:,} texts hold a control token, which stays one"
    if notes[encode.BORDER_TOKENS]:
        yield f"{notes[encode.BORDER_TOKENS]:,} tokens reach over the border of an answer and are not learned"


def _histogram(tally: Tally) -> Iterator[str]:
    """Yield how long the samples are; nothing for a single one."""
    if tally.samples < 2:
        return
    yield "samples by their length in tokens:"
    most = max(tally.lengths.values())
    for length, count in sorted(tally.lengths.items()):
        bar = "#" * max(1, round(_BAR * count / most))
        yield f"  up to {length:>7,} {count:>9,} {bar}"


def refusal_lines(tally: Tally) -> Iterator[str]:
    """Yield how many records were refused, by reason, with the first places of each."""
    if tally.refused:
        yield f"{tally.refused.total():,} records refused:"
    for reason, count in tally.refused.most_common():
        yield f"  {count:,}: {reason.title} ({reason.remedy})"
        for refusal in tally.first[reason]:
            yield f"    {refusal.where}: {refusal.detail}"
