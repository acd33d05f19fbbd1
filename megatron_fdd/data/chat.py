"""Conversations to samples: texts, and which of their characters the model is to learn.

An answer is what follows its generation prompt. For each message of the assistant the template writes the conversation
before it with the generation prompt (what a model sees at inference) and the conversation with it; the second text must
begin with the first, and what follows, up to the token that ends the turn, is learned. Each answer is learned once:
answers behind which the conversation goes on unchanged share one sample; an answer that the template writes differently
later (Qwen3 drops earlier reasoning) gets a sample of its own, which ends with it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_fdd.data.chat_template import ChatSettings, ChatTemplate, Spans
from megatron_fdd.data.conversations import Conversation
from megatron_fdd.data.refusals import Reason, Refusal
from megatron_fdd.data.vanished import Vanished, find_vanished, shape

# What a summary counts besides samples; the rest of a note is its own text.
EMPTY_THINKING = "answers that begin with an empty block of reasoning"
CONTROL_TOKENS = "texts of messages that hold a control token"
REWRITTEN = "answers in a sample of their own, as the template writes them differently later"
ANSWERS = "answers"
ENDS_WITH = "ends with "
_EMPTY_BLOCK = re.compile(r"\s*<think>\s*</think>")


@dataclass(frozen=True, slots=True)
class Sample:
    """One document.

    Attributes:
        text: to be tokenised as a whole, without the tokens that a tokenizer puts around a text.
        learned: ranges of characters, in order, without overlap.
    """

    text: str
    learned: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """One message of the assistant, in the text that ends with it.

    Attributes:
        number: of the message, from 1.
        text: up to and with the token that ends the turn.
        start: where the generation prompt ends and the answer begins.
        end: the token that ends the turn, which is learned too; empty where only marks tell what is learned, and none
            of them encloses it.
    """

    number: int
    text: str
    start: int
    end: str = ""

    @property
    def words(self) -> str:
        """What the model is to say."""
        return self.text[self.start :]


class ChatSampler:
    """Makes the samples of conversations with one template; every worker has a copy."""

    def __init__(self, template: ChatTemplate, settings: ChatSettings) -> None:
        self.template = template
        self._settings = settings
        self._vanished: dict[object, Vanished | None] = {}

    def samples(self, conversation: Conversation, where: str, notes: Counter[str]) -> list[Sample]:
        """The samples of one conversation, in the order of their answers.

        Args:
            where: file and line, for a refusal.
            notes: counts go here, by the constants of this module; `ENDS_WITH` with the token behind it.

        Raises:
            Refusal: the answers cannot be told from what was asked, or a part of the conversation is lost.
        """
        learned = self._learned(conversation, where)
        answers = self._answers(conversation, learned, where)
        self._check_vanished(conversation, learned, where)
        for answer in answers:
            if not answer.words.removesuffix(answer.end).strip():
                raise Refusal(
                    where,
                    Reason.EMPTY,
                    f"message {answer.number}, an answer, is empty in the template's text",
                )
            notes[ANSWERS] += 1
            notes[ENDS_WITH + answer.end] += 1
            notes[EMPTY_THINKING] += bool(_EMPTY_BLOCK.match(answer.words))
        notes[CONTROL_TOKENS] += self._texts_with_control_tokens(conversation)
        samples = _shared(answers)
        notes[REWRITTEN] += len(samples) - 1
        if self._has_marks(conversation, where):
            samples = [self._narrowed(sample, conversation, learned, where) for sample in samples]
        return samples

    def prompt(self, conversation: Conversation) -> str:
        """What a model is given to answer a conversation that ends with somebody else's message.

        Raises:
            Exception: whatever the template raises.
        """
        return self.template.render(conversation, len(conversation.messages), prompt=True)

    def _learned(self, conversation: Conversation, where: str) -> list[int]:
        """Indices of the messages to learn."""
        found = [index for index, is_learned in enumerate(conversation.is_learned) if is_learned]
        # Nothing prompts a first message.
        found = [
            index for index in found if any(m["role"] != "system" for m in conversation.messages[:index])
        ]
        if not found:
            raise Refusal(where, Reason.NOTHING_LEARNED, "no message of the assistant is to be learned")
        if self._settings.turns == "last":
            found = found[-1:]
        for index in found:
            message = conversation.messages[index]
            said = message.get("content") or "", message.get("reasoning_content") or ""
            if not any(text.strip() for text in said) and not message.get("tool_calls"):
                raise Refusal(where, Reason.EMPTY, f"message {index + 1}, an answer, is empty")
        return found

    def _answers(self, conversation: Conversation, learned: Sequence[int], where: str) -> list[Answer]:
        try:
            return [self._answer(conversation, index, where) for index in learned]
        except Refusal as refusal:
            if refusal.reason is not Reason.NOT_FOLLOWED or not self._has_marks(conversation, where):
                raise
            return self._by_marks_alone(conversation, learned, where)

    def _answer(self, conversation: Conversation, index: int, where: str) -> Answer:
        prompt = self._render(conversation, index, True, where)
        text = self._render(conversation, index + 1, False, where)
        if not text.startswith(prompt):
            text = self._behind_a_stand_in(conversation, index, prompt, where)
        message = conversation.messages[index]
        end, token = self._end_of_turn(text, len(prompt))
        if token:
            return Answer(index + 1, text[:end], len(prompt), token)
        opening = self.template.opening(after_call="tool_calls" in message)
        if opening is None:
            raise Refusal(
                where,
                Reason.NO_STOP,
                f"behind message {index + 1} the chat template writes {_quoted(text[-40:])}, which ends with no "
                "special token of the tokenizer",
            )
        return Answer(index + 1, text + opening, len(prompt), opening.strip())

    def _behind_a_stand_in(self, conversation: Conversation, index: int, prompt: str, where: str) -> str:
        """The prompt with the answer as the template writes it behind a question of ours.

        For templates that put the system's text, or the tools, elsewhere once the answer is there (Mistral's). Both
        prompts must end alike: an answer behind a header is not one behind none.
        """
        alone = replace(
            conversation,
            messages=({"role": "user", "content": "?"}, conversation.messages[index]),
            is_learned=(False, True),
        )
        asked = self._render(alone, 1, True, where)
        text = self._render(alone, 2, False, where)
        header = asked[asked.rfind("?") + 1 :]
        if not text.startswith(asked) or not prompt.endswith(header):
            shown = self._render(conversation, index + 1, False, where)
            begins = next(
                (at for at, pair in enumerate(zip(prompt, shown, strict=False)) if pair[0] != pair[1]),
                len(shown),
            )
            raise Refusal(
                where,
                Reason.NOT_FOLLOWED,
                f"message {index + 1} does not follow its generation prompt: that goes on with "
                f"{_quoted(prompt[begins:][:40])}, the conversation with {_quoted(shown[begins:][:40])}",
            )
        return prompt + text[len(asked) :]

    def _end_of_turn(self, text: str, start: int) -> tuple[int, str]:
        """Where the first of the tokens that end the text ends, and which it is; an empty one where none does.

        One directly before the tokenizer's or the model's own end only closes the words (Cohere's <|END_RESPONSE|>):
        nothing would stop there.
        """
        found, rest, own = (len(text), ""), text, self.template.stop_tokens
        while True:
            blank = len(rest) - len(rest.rstrip())
            rest = rest.rstrip()
            token = max((each for each in self.template.ends if rest.endswith(each)), key=len, default=None)
            if token is None or len(rest) - len(token) < start:
                return found
            if not blank and found[1] in own and token not in own:
                return found
            found, rest = (len(rest), token), rest[: -len(token)]

    def _has_marks(self, conversation: Conversation, where: str) -> bool:
        try:
            return self.template.has_marks(with_tools=conversation.tools is not None)
        except Exception as error:
            raise _refused(where, error) from error

    def _marks(self, conversation: Conversation, where: str) -> Spans:
        try:
            return self.template.marks(conversation)
        except Exception as error:
            raise _refused(where, error) from error

    def _by_marks_alone(self, conversation: Conversation, learned: Sequence[int], where: str) -> list[Answer]:
        """The marks' word is all there is: the n-th mark is the n-th message of the assistant."""
        marks = self._marks(conversation, where)
        spoken = [index for index, m in enumerate(conversation.messages) if m["role"] == "assistant"]
        if len(marks) != len(spoken):
            raise Refusal(
                where,
                Reason.NOT_FOLLOWED,
                f"the answers do not follow their generation prompts, and the template marks {len(marks)} places for "
                f"{len(spoken)} messages of the assistant",
            )
        text = self._render(conversation, len(conversation.messages), False, where)
        places = dict(zip(spoken, marks, strict=True))
        answers = []
        for index in learned:
            start, marked_end = places[index]
            end, token = self._end_of_turn(
                text[:marked_end], start
            )  # an author may have marked the line break
            answers.append(Answer(index + 1, text[:end], start, token))
        return answers

    def _narrowed(
        self, sample: Sample, conversation: Conversation, learned: Sequence[int], where: str
    ) -> Sample:
        """What is also marked, in the text of the conversation up to this sample's last answer."""
        for index in reversed(learned):
            count = index + 1
            part = replace(
                conversation,
                messages=conversation.messages[:count],
                is_learned=conversation.is_learned[:count],
            )
            text = self._render(part, count, False, where)
            if text.startswith(sample.text) or sample.text.startswith(text):
                marks = self._marks(part, where)
                # What is appended to an answer that no token ends (`opening`) goes with the last of its words.
                marks = [(start, len(sample.text) if end == len(text) else end) for start, end in marks]
                kept = tuple(_intersection(sample.learned, marks))
                if not kept:
                    raise Refusal(where, Reason.NOTHING_LEARNED, "the template marks nothing in its answers")
                return Sample(sample.text, kept)
        return sample  # put behind a stand-in: no text of the template has the marks at their places

    def _check_vanished(self, conversation: Conversation, learned: Sequence[int], where: str) -> None:
        """Refuse what the template drops; looked at once for each shape of a conversation."""
        key = shape(conversation), tuple(learned)
        if key not in self._vanished:

            def answers(marked: Conversation) -> dict[int, tuple[str, str]]:
                found = self._answers(marked, learned, where)
                return {each.number - 1: (each.text[: each.start], each.words) for each in found}

            self._vanished[key] = find_vanished(conversation, answers, self._settings.allowed)
        vanished = self._vanished[key]
        if vanished is not None:
            detail = f"{vanished.where} ({vanished.field}): the chat template does not write it"
            raise Refusal(where, Reason.DROPPED, detail)

    def _texts_with_control_tokens(self, conversation: Conversation) -> int:
        special = [token for token, is_special in self.template.added_tokens.items() if is_special]
        texts = [str(message.get("content", "")) for message in conversation.messages]
        return sum(any(token in text for token in special) for text in texts if "<" in text or "[" in text)

    def _render(self, conversation: Conversation, count: int, prompt: bool, where: str) -> str:
        try:
            return self.template.render(conversation, count, prompt=prompt)
        except (
            Exception
        ) as error:  # a template is a program from somewhere: division by zero, memory, recursion
            raise _refused(where, error) from error


def _shared(answers: Sequence[Answer]) -> list[Sample]:
    """From the last answer backwards: into the sample of a later one where that begins with this one's text."""
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


def _intersection(
    first: Sequence[tuple[int, int]], second: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, int]]:
    """What lies in both; of marks that touch, one range: a token may stand for the end of one and the next's begin."""
    joined: list[tuple[int, int]] = []
    for start, end in second:
        touches = bool(joined) and joined[-1][1] == start
        joined.append((joined.pop()[0] if touches else start, end))
    for start, end in first:
        for other_start, other_end in joined:
            if max(start, other_start) < min(end, other_end):
                yield max(start, other_start), min(end, other_end)


def _refused(where: str, error: Exception) -> Refusal:
    text = str(error).splitlines()[0] if str(error) else "no message"
    return Refusal(
        where, Reason.RAISED, f"the chat template refuses it ({type(error).__name__}: {text[:200]})"
    )


def _quoted(text: str) -> str:
    return repr(text) if text else "nothing"
