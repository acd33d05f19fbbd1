"""From one raw document to token ids and, for instructions, the mask of the tokens that are learned."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from megatron_fdd.data.chat import ChatSampler
from megatron_fdd.data.chat_template import ChatSettings
from megatron_fdd.data.conversations import Conversation, instruction_conversation, read_conversation
from megatron_fdd.data.documents import DocumentFormat, JsonKeys, RawDocument
from megatron_fdd.data.instructions import (
    Instruction,
    Template,
    find_layout,
    known_layouts,
    read_pair,
    read_record,
)
from megatron_fdd.data.refusals import Reason, Refusal, refusing
from megatron_fdd.data.sample_tokens import encode_sample
from megatron_fdd.data.tokenizer import TextTokenizer, TokenizerSettings
from megatron_fdd.data.tokenizer_identity import without_second_start

# Notes on a document, besides those in `chat`.
BORDER_TOKENS = "tokens that reach over the border of an answer"
LAST_SAMPLES = "tokens of the last sample of each conversation"
EMPTY_DOCUMENTS = "empty documents"
UNKNOWN_FIELD = "unknown field "
LEFT_OUT = "samples left out of a conversation: their prompt fills --seq-length"
PAIRS = "prompts and responses, which get no chat template"


@dataclass(frozen=True, slots=True)
class EncodeSettings:
    """Everything that decides the ids of a document.

    Attributes:
        append_eod: end each text document with the end-of-document token (a response always ends with it).
        seq_length: for instructions only: keep what one training sample of this length can hold.
        template: how a record in one of the layouts of `instructions` becomes a prompt; None where records
            have prompt and response.
        chat: settings of conversations.
    """

    tokenizer: TokenizerSettings
    format: DocumentFormat
    keys: JsonKeys = field(default_factory=JsonKeys)
    append_eod: bool = False
    seq_length: int | None = None
    template: Template | None = None
    chat: ChatSettings = field(default_factory=ChatSettings)


@dataclass(frozen=True, slots=True)
class Encoded:
    """One encoded sample.

    Attributes:
        ids: int32.
        loss_mask: uint8, 1 for each token that is learned; None for plain text, where all tokens are.
        truncated: whether the end was cut off.
    """

    ids: np.ndarray
    loss_mask: np.ndarray | None = None
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class EncodedDocument:
    """The result of encoding one document.

    Attributes:
        samples: empty if the document is empty or refused; several if a chat's template rewrites earlier answers.
        refusal: why there are no samples; None if the document is only empty.
        notes: counts for the summary.
    """

    samples: tuple[Encoded, ...] = ()
    refusal: Refusal | None = None
    notes: Counter[str] = field(default_factory=Counter)


class Encoder:
    """Encodes documents of one format with one tokenizer; every worker has a copy."""

    def __init__(self, settings: EncodeSettings, tokenizer: TextTokenizer) -> None:
        """Prepare to encode with `tokenizer`, which `settings.tokenizer` describes.

        Raises:
            ValueError: the tokenizer lacks the end-of-document token that is needed, or its chat template lacks
                a variable that is set.
        """
        self.settings = settings
        self.tokenizer = tokenizer
        self._eod = self.tokenizer.eod
        self._sampler: ChatSampler | None = None
        if settings.format == "instruction" and tokenizer.chat_template:
            self._sampler = ChatSampler(tokenizer.chat(settings.chat), settings.chat)
        needs_eod = settings.append_eod or settings.format == "instruction"
        if needs_eod and self._eod < 0:
            raise ValueError(
                f"--tokenizer-model {settings.tokenizer.tokenizer_model} has no end-of-sequence token, which "
                "--append-eod and instruction data need; use a tokenizer that defines one"
            )

    def __call__(self, document: RawDocument) -> EncodedDocument:
        """Encode one document. No content raises an error: at worst the document is refused."""
        notes: Counter[str] = Counter()
        try:
            return EncodedDocument(tuple(self._samples(document, notes)), notes=+notes)
        except Refusal as refusal:
            return EncodedDocument(refusal=refusal)
        except Exception as error:  # from a JSON parser, a template or a tokenizer; the cause is the data
            line = (str(error).splitlines() or ["no message"])[0][:200]
            detail = f"cannot be encoded ({type(error).__name__}: {line})"
            return EncodedDocument(refusal=Refusal(document.where, Reason.MALFORMED, detail))

    def _samples(self, document: RawDocument, notes: Counter[str]) -> list[Encoded]:
        if self.settings.format == "instruction":
            return self._instruction_samples(document, notes)
        text = document.text()
        if self.settings.format == "jsonl":
            text = document.text_field(document.json_object(), self.settings.keys.text)
        if not text.strip():
            notes[EMPTY_DOCUMENTS] += 1
            return []
        ids = without_second_start(self.tokenizer.ids(text), self.tokenizer.start)
        if not ids:  # a normaliser may leave nothing of signs that no eye sees
            notes[EMPTY_DOCUMENTS] += 1
            return []
        if self.settings.append_eod and ids[-1:] != [self._eod]:
            ids = [*ids, self._eod]
        return [Encoded(np.array(ids, np.int32))]

    def _instruction_samples(self, document: RawDocument, notes: Counter[str]) -> list[Encoded]:
        """Return a chat's samples, or the one of a prompt and response, each of at most `seq_length + 1` tokens.

        Longer samples are cut on the right. The limit is one token above the sequence length because a sample's
        inputs and labels are shifted by one.
        """
        fields, template = document.json_object(), self.settings.template
        keys = self.settings.keys
        conversation = read_conversation(fields, document.where, response_key=keys.response)
        if conversation is not None:
            return self._chat_samples(conversation, document.where, notes)
        if template is None:
            pair = read_pair(fields, keys.prompt, keys.response, document.where)
            notes[PAIRS] += 1
            return [self._cut(*_encode_pair(self.tokenizer, *pair), document.where)]
        layout = find_layout(fields)
        if layout is None:
            raise Refusal(
                document.where,
                Reason.FIELDS,
                f"has the fields {sorted(fields)}, none of the layouts of --template {template}: {known_layouts()}",
            )
        instruction = _only_one(read_record(layout, fields, document.where), document.where)
        if template == "chat":
            conversation = instruction_conversation(instruction, document.where)
            return self._chat_samples(conversation, document.where, notes)
        with refusing(document.where):
            prompt = instruction.prompt(template)
        return [self._cut(*_encode_pair(self.tokenizer, prompt, instruction.references[0]), document.where)]

    def _chat_samples(self, conversation: Conversation, where: str, notes: Counter[str]) -> list[Encoded]:
        if self._sampler is None:
            raise Refusal(
                where, Reason.NO_TEMPLATE, "a chat needs a chat template and the tokenizer has none"
            )
        for name in conversation.unknown_fields:
            notes[UNKNOWN_FIELD + name] += 1
        encoded: list[Encoded] = []
        too_long: Refusal | None = None
        for sample in self._sampler.samples(conversation, where, notes):
            ids, mask, num_crossing = encode_sample(self.tokenizer, sample)
            notes[BORDER_TOKENS] += num_crossing
            try:
                encoded.append(self._cut(ids, mask, where))
            except Refusal as refusal:  # the other samples of the conversation remain usable
                too_long = refusal
                notes[LEFT_OUT] += 1
        if not encoded:
            assert too_long is not None
            raise too_long
        notes[LAST_SAMPLES] += len(encoded[-1].ids)
        return encoded

    def _cut(self, ids: np.ndarray, mask: np.ndarray, where: str) -> Encoded:
        """Return a sample of at most `seq_length + 1` tokens."""
        limit = len(ids) if self.settings.seq_length is None else self.settings.seq_length + 1
        # The first token is never a label: there is nothing before it to predict it from.
        if not mask[1:].any():
            raise Refusal(where, Reason.NOTHING_LEARNED, "no token of it is learned")
        if not mask[1:limit].any():
            raise Refusal(
                where,
                Reason.TOO_LONG,
                f"its prompt has {int(np.flatnonzero(mask[1:])[0]) + 1} tokens, --seq-length "
                f"{self.settings.seq_length} leaves nothing of the answer",
            )
        return Encoded(ids[:limit], mask[:limit], truncated=len(ids) > limit)


def _only_one(instructions: list[Instruction], where: str) -> Instruction:
    if len(instructions) != 1:
        raise Refusal(
            where,
            Reason.FIELDS,
            f"holds {len(instructions)} instructions; training reads one from each line, so write a line for each",
        )
    if not instructions[0].references:
        raise Refusal(where, Reason.EMPTY, "has no answer to learn")
    return instructions[0]


def _encode_pair(tokenizer: TextTokenizer, prompt: str, response: str) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and mask of prompt and response, closed by the end-of-document token.

    The prompt is tokenised alone, as it is when the student is asked. The response's ids are those of both
    together, without the prompt's. If a token would reach over the border between them, the response is tokenised
    alone too.
    """
    prompt_ids = tokenizer.plain_ids(prompt)
    joint_ids = tokenizer.plain_ids(prompt + response)
    if joint_ids[: len(prompt_ids)] == prompt_ids:
        response_ids = joint_ids[len(prompt_ids) :]
    else:
        response_ids = tokenizer.plain_ids(response)
    if response_ids[-1:] != [tokenizer.eod]:
        response_ids = [*response_ids, tokenizer.eod]
    asked = without_second_start([*tokenizer.leading_ids, *prompt_ids], tokenizer.start)
    mask = np.ones(len(asked) + len(response_ids), np.uint8)
    mask[: len(asked)] = 0
    return np.array([*asked, *response_ids], np.int32), mask
