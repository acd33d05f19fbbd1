"""From conversations to samples: texts, and the characters in them that the model learns.

An answer is what follows its generation prompt. For each message of the assistant the template writes two texts:
the conversation before it with the generation prompt (what a model sees at inference), and the conversation with
it. The second text must begin with the first. The rest of it, up to the token that ends the turn, is learned. Each
answer is learned once. Answers after which the conversation goes on unchanged share one sample; an answer that the
template writes differently later (Qwen3 drops earlier reasoning) gets a sample of its own, which ends with it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from megatron_fdd.data.answers import Answer, Sample, Written, find_answers, narrowed, shared
from megatron_fdd.data.chat_template import ChatSettings, ChatTemplate
from megatron_fdd.data.conversations import Conversation
from megatron_fdd.data.refusals import Reason, Refusal
from megatron_fdd.data.vanished import Answers, find_vanished

# Notes: what a summary counts besides samples. The text of a note is printed as it is.
EMPTY_THINKING = "answers that begin with an empty block of reasoning"
CONTROL_TOKENS = "texts of messages that hold a control token"
REWRITTEN = "answers in a sample of their own, as the template writes them differently later"
MARKS_ALONE = "answers that only the template's marks tell"
ANSWERS = "answers"
ENDS_WITH = "ends with "
_EMPTY_BLOCK = re.compile(r"\s*<think>\s*</think>")


class ChatSampler:
    """Makes samples of conversations with one template; every worker has a copy."""

    def __init__(self, template: ChatTemplate, settings: ChatSettings) -> None:
        self.template = template
        self._settings = settings

    def samples(self, conversation: Conversation, where: str, notes: Counter[str]) -> list[Sample]:
        """Return the samples of one conversation, in the order of their answers.

        Args:
            where: file and line, named in a refusal.
            notes: the counts to add to; keys are the constants of this module, `ENDS_WITH` with the token after it.

        Raises:
            Refusal: the answers cannot be told from the questions, or a part of the conversation is lost.
        """
        learned = self._learned(conversation, where)
        written = Written(self.template, conversation, where)
        answers = find_answers(written, learned)
        self._check_vanished(written, learned, answers)
        for answer in answers:
            if not answer.words.removesuffix(answer.end).strip():
                detail = f"message {answer.number}, an answer, is empty in the template's text"
                raise Refusal(where, Reason.EMPTY, detail)
            notes[ANSWERS] += 1
            notes[ENDS_WITH + answer.end] += 1
            notes[MARKS_ALONE] += answer.by_marks
            notes[EMPTY_THINKING] += bool(_EMPTY_BLOCK.match(answer.words))
        notes[CONTROL_TOKENS] += self._texts_with_control_tokens(conversation)
        samples = shared(answers)
        notes[REWRITTEN] += len(samples) - 1
        if written.has_marks:
            samples = [narrowed(sample, written, learned) for sample in samples]
        return samples

    def prompt(self, conversation: Conversation) -> str:
        """Return the prompt that a model gets to answer a conversation; somebody else's message ends it.

        Raises:
            Exception: whatever the template raises.
        """
        return self.template.render(conversation, len(conversation.messages), prompt=True)

    def _learned(self, conversation: Conversation, where: str) -> list[int]:
        """Return the indices of the messages to learn."""
        found = [index for index, is_learned in enumerate(conversation.is_learned) if is_learned]
        # A first message has nothing before it that prompts it.
        found = [
            index for index in found if any(m["role"] != "system" for m in conversation.messages[:index])
        ]
        if not found:
            raise Refusal(where, Reason.NOTHING_LEARNED, "no message of the assistant is to be learned")
        if self._settings.turns == "last":
            found = found[-1:]
        for index in found:
            message = conversation.messages[index]
            said = message.get("content", "").rpartition("</think>")[2].strip()
            if not said and not message.get("tool_calls"):
                raise Refusal(where, Reason.EMPTY, f"message {index + 1}, an answer, says nothing")
        return found

    def _check_vanished(self, written: Written, learned: Sequence[int], answers: Sequence[Answer]) -> None:
        """Refuse a conversation that the template does not write completely."""

        def again(marked: Conversation) -> Answers:
            return _by_message(find_answers(replace(written, conversation=marked), learned))

        vanished = find_vanished(written.conversation, _by_message(answers), again, self._settings.allowed)
        if vanished:
            places = ", ".join(f"{each.where} ({each.field})" for each in vanished)
            detail = f"{places}: {self.template.told} does not write {'it' if len(vanished) == 1 else 'them'}"
            raise Refusal(written.where, Reason.DROPPED, detail)

    def _texts_with_control_tokens(self, conversation: Conversation) -> int:
        special = [token for token, is_special in self.template.added_tokens.items() if is_special]
        texts = [str(message.get("content", "")) for message in conversation.messages]
        return sum(any(token in text for token in special) for text in texts if "<" in text or "[" in text)


def _by_message(answers: Sequence[Answer]) -> Answers:
    return {each.number - 1: (each.text[: each.start], each.words) for each in answers}
