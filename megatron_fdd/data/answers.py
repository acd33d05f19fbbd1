"""The places of the answers in the text of a chat template.

An answer is what follows a generation prompt, up to the end of the turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_fdd.data.chat_template import ChatTemplate, Spans
from megatron_fdd.data.conversations import Conversation
from megatron_fdd.data.refusals import Reason, Refusal
from megatron_fdd.data.render_limits import TemplateLimitError
from megatron_fdd.data.render_process import TemplateRaisedError


@dataclass(frozen=True, slots=True)
class Sample:
    """One document to tokenise, with the parts of it that are learned.

    Attributes:
        text: is tokenised as a whole, without the tokens that a tokenizer puts around a text.
        learned: ranges of characters, in order, without overlap.
    """

    text: str
    learned: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """One message of the assistant, in the text that ends with it.

    Attributes:
        number: the number of the message, from 1.
        text: the text up to and with the token that ends the turn.
        start: the character where the generation prompt ends and the answer begins.
        end: the token that ends the turn, which is learned too; empty where only marks tell what is learned and the
            marks enclose no such token.
        by_marks: true if the answer does not follow its generation prompt, so that only the template's marks tell
            where it is.
    """

    number: int
    text: str
    start: int
    end: str = ""
    by_marks: bool = False

    @property
    def words(self) -> str:
        """The answer itself: the text that the model is to say."""
        return self.text[self.start :]


@dataclass(frozen=True, slots=True)
class Written:
    """A conversation as a template writes it.

    Whatever the template raises becomes a refusal of the record at `where`.
    """

    template: ChatTemplate
    conversation: Conversation
    where: str

    def text(self, count: int) -> str:
        """Return the text of the first `count` messages."""
        try:
            return self.template.render(self.conversation, count, prompt=False)
        except Exception as error:  # somebody's program: division by zero, memory, recursion
            raise self.refused(error) from error

    def before_and_with(self, index: int) -> tuple[str, str]:
        """Return the text before a message, where the model begins to answer, and the text with it."""
        try:
            return self.template.before_and_with(self.conversation, index)
        except Exception as error:
            raise self.refused(error) from error

    def marks(self) -> Spans:
        """Return the ranges of characters between `{% generation %}` and `{% endgeneration %}`."""
        try:
            return self.template.marks(self.conversation)
        except Exception as error:
            raise self.refused(error) from error

    @property
    def has_marks(self) -> bool:
        """Whether the template marks what the assistant says."""
        try:
            return self.template.has_marks(with_tools=self.conversation.tools is not None)
        except Exception as error:
            raise self.refused(error) from error

    def first(self, count: int) -> Written:
        """Return a copy that has only the first `count` messages."""
        messages, is_learned = self.conversation.messages[:count], self.conversation.is_learned[:count]
        return replace(
            self, conversation=replace(self.conversation, messages=messages, is_learned=is_learned)
        )

    def behind_a_question(self, index: int) -> Written:
        """Return a copy in which one message stands alone, after a question of ours."""
        messages = {"role": "user", "content": "?"}, self.conversation.messages[index]
        alone = replace(self.conversation, messages=messages, is_learned=(False, True))
        return replace(self, conversation=alone)

    def refused(self, error: Exception) -> Refusal:
        """Return the refusal of the record for what a template raised."""
        kind = error.kind if isinstance(error, TemplateRaisedError) else type(error).__name__
        text = (str(error).splitlines() or ["no message"])[0][:200]
        detail = f"{self.template.told} refuses it ({kind}: {text})"
        return Refusal(self.where, Reason.RAISED, detail)


def find_answers(written: Written, learned: Sequence[int]) -> list[Answer]:
    """Return the answers in these messages.

    Raises:
        Refusal: an answer does not follow its generation prompt and no marks show where it is; or no token ends it.
    """
    try:
        return [_answer(written, index) for index in learned]
    except Refusal as refusal:
        if refusal.reason is not Reason.NOT_FOLLOWED or not written.has_marks:
            raise
        return _by_marks_alone(written, learned)
    except TemplateLimitError as error:  # of a text of ours, which tells the ends of turns
        raise written.refused(error) from error


def shared(answers: Sequence[Answer]) -> list[Sample]:
    """Return samples that share text: an answer joins the sample of a later one whose text begins with its own."""
    samples: list[tuple[str, list[tuple[int, int]]]] = []
    for answer in reversed(answers):
        span = answer.start, len(answer.text)
        for text, learned in samples:
            if text.startswith(answer.text):
                learned.insert(0, span)
                break
        else:
            samples.append((answer.text, [span]))
    return [Sample(text, tuple(learned)) for text, learned in reversed(samples)]


def narrowed(sample: Sample, written: Written, learned: Sequence[int]) -> Sample:
    """Return a sample in which only what the template marks is learned.

    The marks are those of the conversation up to the sample's last answer.

    Raises:
        Refusal: the marks leave nothing to learn.
    """
    for index in reversed(learned):
        part = written.first(index + 1)
        text = part.text(index + 1)
        if text.startswith(sample.text) or sample.text.startswith(text):
            # If no token ends an answer, `opening` is appended to it; that text counts with the answer's last word.
            marks = [(start, len(sample.text) if end == len(text) else end) for start, end in part.marks()]
            kept = tuple(_intersection(sample.learned, marks))
            if not kept:
                raise Refusal(
                    written.where, Reason.NOTHING_LEARNED, "the template marks nothing in its answers"
                )
            return Sample(sample.text, kept)
    return sample  # answered a stand-in question: no text of the template has the marks at these places


def _answer(written: Written, index: int) -> Answer:
    prompt, text = written.before_and_with(index)
    if not text.startswith(prompt):
        text = _behind_a_stand_in(written, index, prompt)
    end, token = _end_of_turn(written.template, text, len(prompt))
    if token:
        return Answer(index + 1, text[:end], len(prompt), token)
    has_calls = "tool_calls" in written.conversation.messages[index]
    opening = written.template.opening(after_call=has_calls)
    if opening is None:
        raise Refusal(
            written.where,
            Reason.NO_STOP,
            f"after message {index + 1} {written.template.told} writes {_quoted(text[-40:])}, which ends with no "
            "special token of the tokenizer",
        )
    return Answer(index + 1, text + opening, len(prompt), opening.strip())


def _behind_a_stand_in(written: Written, index: int, prompt: str) -> str:
    """Return the prompt, followed by the answer as the template writes it after a question of ours.

    Some templates (Mistral's) put the system text or the tools elsewhere once the answer is there. The prompts of
    both conversations must end alike: an answer after a header differs from one without a header.
    """
    alone = written.behind_a_question(index)
    asked, text = alone.before_and_with(1)
    header = asked[asked.rfind("?") + 1 :]
    if text.startswith(asked) and prompt.endswith(header):
        return prompt + text[len(asked) :]
    shown = written.text(index + 1)
    pairs = enumerate(zip(prompt, shown, strict=False))
    begins = next((at for at, (one, other) in pairs if one != other), len(shown))
    raise Refusal(
        written.where,
        Reason.NOT_FOLLOWED,
        f"message {index + 1} does not follow its generation prompt: that goes on with "
        f"{_quoted(prompt[begins:][:40])}, the conversation with {_quoted(shown[begins:][:40])}",
    )


def _end_of_turn(template: ChatTemplate, text: str, start: int) -> tuple[int, str]:
    """Return where the first of the tokens that end the text ends, and that token; an empty token if there is none.

    A token directly before the tokenizer's or the model's own end token only closes the words (Cohere's
    <|END_RESPONSE|>): generation would not stop there.
    """
    found, rest, own = (len(text), ""), text, template.stop_tokens
    while True:
        has_blank = rest != rest.rstrip()
        rest = rest.rstrip()
        token = max((each for each in template.ends if rest.endswith(each)), key=len, default=None)
        if token is None or len(rest) - len(token) < start:
            return found
        if not has_blank and found[1] in own and token not in own:
            return found
        found, rest = (len(rest), token), rest[: -len(token)]


def _by_marks_alone(written: Written, learned: Sequence[int]) -> list[Answer]:
    """Return the answers as the template's marks give them: the n-th mark is the n-th message of the assistant."""
    messages = written.conversation.messages
    marks = written.marks()
    spoken = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if len(marks) != len(spoken):
        raise Refusal(
            written.where,
            Reason.NOT_FOLLOWED,
            f"the answers do not follow their generation prompts, and the template marks {len(marks)} places for "
            f"{len(spoken)} messages of the assistant",
        )
    text = written.text(len(messages))
    places = dict(zip(spoken, marks, strict=True))
    answers = []
    for index in learned:
        start, marked_end = places[index]
        # An author may have marked the line break after the end too.
        end, token = _end_of_turn(written.template, text[:marked_end], start)
        answers.append(Answer(index + 1, text[:end], start, token, by_marks=True))
    return answers


def _intersection(
    first: Sequence[tuple[int, int]], second: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, int]]:
    """Yield what lies in ranges of both.

    Ranges of `second` that touch are joined first: one token may hold the end of one and the start of the next.
    """
    joined: list[tuple[int, int]] = []
    for start, end in second:
        touches = bool(joined) and joined[-1][1] == start
        joined.append((joined.pop()[0] if touches else start, end))
    for start, end in first:
        for other_start, other_end in joined:
            if max(start, other_start) < min(end, other_end):
                yield max(start, other_start), min(end, other_end)


def _quoted(text: str) -> str:
    return repr(text) if text else "nothing"
