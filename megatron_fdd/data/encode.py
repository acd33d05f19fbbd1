"""One raw document to token ids, and for instructions the mask of what is learned."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from megatron_fdd.data.chat import encode_chat, parse_messages
from megatron_fdd.data.documents import DocumentFormat, JsonKeys, RawDocument
from megatron_fdd.data.instructions import Instruction, Template, find_layout, known_layouts, read_record
from megatron_fdd.data.tokenizer import TextTokenizer, TokenizerSettings


@dataclass(frozen=True, slots=True)
class EncodeSettings:
    """Everything that decides the ids of a document.

    Attributes:
        append_eod: close each text document with the end-of-document token (a response always is).
        seq_length: instructions only: keep what one training sample of this length can hold.
        template: how records that have no prompt and response but one of the layouts of `instructions` are put.
    """

    tokenizer: TokenizerSettings
    format: DocumentFormat
    keys: JsonKeys = field(default_factory=JsonKeys)
    append_eod: bool = False
    seq_length: int | None = None
    template: Template | None = None


@dataclass(frozen=True, slots=True)
class Encoded:
    """One document.

    Attributes:
        ids: int32.
        loss_mask: uint8, 1 for each token that is learned; None for plain text, where all are.
        truncated: whether the end was cut off.
    """

    ids: np.ndarray
    loss_mask: np.ndarray | None = None
    truncated: bool = False


class Encoder:
    """Encodes documents of one format with one tokenizer; every worker has a copy."""

    def __init__(self, settings: EncodeSettings, tokenizer: TextTokenizer) -> None:
        """`tokenizer`: of `settings.tokenizer`.

        Raises:
            ValueError: it lacks the end-of-document token that is asked for.
        """
        self.settings = settings
        self.tokenizer = tokenizer
        self._eod = self.tokenizer.eod
        needs_eod = settings.append_eod or settings.format == "instruction"
        if needs_eod and self._eod < 0:
            raise ValueError(
                f"--tokenizer-model {settings.tokenizer.tokenizer_model} has no end-of-sequence token, which "
                "--append-eod and instruction data need; use a tokenizer that defines one"
            )

    def __call__(self, document: RawDocument) -> Encoded | None:
        """Encode one document; None when it is to be skipped (empty, or nothing in it is learned).

        Raises:
            ValueError: malformed; names file and line.
        """
        if self.settings.format == "instruction":
            return self._encode_instruction(document)
        text = document.text()
        if self.settings.format == "jsonl":
            text = document.text_field(document.json_object(), self.settings.keys.text)
        return self._encode_text(text)

    def _encode_text(self, text: str) -> Encoded | None:
        if not text.strip():
            return None
        ids = self.tokenizer.ids(text)
        if self.settings.append_eod and ids[-1:] != [self._eod]:
            ids = [*ids, self._eod]
        return Encoded(np.array(ids, np.int32)) if ids else None

    def _encode_instruction(self, document: RawDocument) -> Encoded | None:
        """Chat or prompt and response; truncated on the right to `seq_length + 1` tokens.

        One token more than the sequence, because a sample's inputs and labels are shifted by one.
        """
        ids, mask = self._ids_and_mask(document)
        limit = len(ids) if self.settings.seq_length is None else self.settings.seq_length + 1
        truncated = len(ids) > limit
        ids, mask = ids[:limit], mask[:limit]
        # The first token is never a label: nothing stands before it to predict it from.
        return Encoded(ids, mask, truncated) if mask[1:].any() else None

    def _ids_and_mask(self, document: RawDocument) -> tuple[np.ndarray, np.ndarray]:
        fields, template = document.json_object(), self.settings.template
        if "messages" in fields:
            return encode_chat(
                self.tokenizer, parse_messages(fields["messages"], document.where), document.where
            )
        if template is None:
            keys = self.settings.keys
            prompt = document.text_field(fields, keys.prompt)
            response = document.text_field(fields, keys.response)
            return _encode_pair(self.tokenizer, prompt, response)
        layout = find_layout(fields)
        if layout is None:
            raise ValueError(
                f"{document.where}: has the fields {sorted(fields)}, no layout that --template {template} reads: "
                f"{known_layouts()}"
            )
        instruction = _only_one(read_record(layout, fields, document.where), document.where)
        response = instruction.references[0]
        if template == "chat":
            messages = [
                {"role": "user", "content": instruction.message()},
                {"role": "assistant", "content": response},
            ]
            return encode_chat(self.tokenizer, messages, document.where)
        return _encode_pair(self.tokenizer, instruction.prompt(template), response)


def _only_one(instructions: list[Instruction], where: str) -> Instruction:
    if len(instructions) != 1:
        raise ValueError(
            f"{where}: holds {len(instructions)} instructions; training reads one a line, so write a line for each"
        )
    if not instructions[0].references:
        raise ValueError(f"{where}: has no answer to learn")
    return instructions[0]


def _encode_pair(tokenizer: TextTokenizer, prompt: str, response: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of prompt and response, closed by the end-of-document token.

    The prompt is tokenised by itself, as it will be when the student is asked. The response is what the
    tokenizer makes of both together, less the prompt; where that does not begin with the prompt's ids (a
    token would reach over the border) it is tokenised by itself too.
    """
    prompt_ids = tokenizer.plain_ids(prompt)
    joint_ids = tokenizer.plain_ids(prompt + response)
    if joint_ids[: len(prompt_ids)] == prompt_ids:
        response_ids = joint_ids[len(prompt_ids) :]
    else:
        response_ids = tokenizer.plain_ids(response)
    if response_ids[-1:] != [tokenizer.eod]:
        response_ids = [*response_ids, tokenizer.eod]
    num_prompt = len(tokenizer.leading_ids) + len(prompt_ids)
    ids = np.array([*tokenizer.leading_ids, *prompt_ids, *response_ids], np.int32)
    mask = np.ones(len(ids), np.uint8)
    mask[:num_prompt] = 0
    return ids, mask
