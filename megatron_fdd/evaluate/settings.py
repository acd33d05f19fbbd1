"""How models are asked and scored, as a command line says it; no torch is imported."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_fdd.data.chat_template import ChatSettings
from megatron_fdd.data.documents import input_bytes
from megatron_fdd.data.instructions import Template
from megatron_fdd.data.records import check_text

DTYPES = ("float32", "bfloat16", "float16")
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """How models are asked; the defaults are those of MiniLLM, DistiLLM and FDD.

    Attributes:
        temperature: 0 takes the most probable token; all seeds would then give the same, so only the first is run.
        max_prompt_tokens: a longer prompt loses its end, as in published work.
        chat_template: jinja text in place of the tokenizer's own; this and the next two are for the template `chat`.
        chat_template_kwargs: switches of the chat template.
        chat_date: the date that the template writes as today's; None for the real date.
    """

    template: Template = "alpaca"
    seeds: tuple[int, ...] = (10, 20, 30, 40, 50)
    temperature: float = 1.0
    top_p: float = 1.0
    max_prompt_tokens: int = 256
    max_new_tokens: int = 256
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    chat_date: datetime.date | None = None

    def check(self) -> None:
        """Refuse values that have no meaning.

        Raises:
            ValueError: names the flag and the bound.
        """
        bounds = (
            ("--temperature", self.temperature, 0 <= self.temperature < math.inf, "a number, 0 or more"),
            ("--top-p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1"),
            ("--max-prompt-tokens", self.max_prompt_tokens, self.max_prompt_tokens >= 1, "at least 1"),
            ("--max-new-tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            (
                "--seeds",
                self.seeds,
                len(set(self.seeds)) == len(self.seeds) > 0,
                "different ones, at least one",
            ),
        )
        for flag, value, holds, bound in bounds:
            if not holds:
                raise ValueError(f"{flag} {value}: {bound}")
        if self.template != "chat" and (self.chat_template or self.chat_template_kwargs or self.chat_date):
            raise ValueError(
                f"--chat-template, --chat-template-kwargs and --chat-date are for --template chat, this is "
                f"--template {self.template}: leave them out, or say --template chat"
            )
        _ = self.chat

    @property
    def chat(self) -> ChatSettings:
        """Settings of conversations."""
        return ChatSettings(self.chat_template_kwargs, self.chat_date or datetime.date.today())

    @property
    def runs(self) -> tuple[int, ...]:
        """The seeds that make a difference."""
        return self.seeds if self.temperature > 0 else self.seeds[:1]


@dataclass(frozen=True, slots=True)
class Text:
    """The texts on which models are scored, and the prompts that they continue.

    Attributes:
        validation: JSONL file that is scored.
        training: JSONL file whose word frequencies are the unigram model.
        length: tokens in a window.
        max_tokens: how many tokens are scored at most.
        prompts: texts that every model continues, greedily.
        num_sample_tokens: how many tokens a model adds to a prompt.
    """

    validation: Path | None = None
    training: Path | None = None
    length: int = 128
    max_tokens: int = 8192
    prompts: tuple[str, ...] = ()
    num_sample_tokens: int = 40

    def check(self) -> None:
        """Refuse texts that cannot be scored, before a model is loaded.

        Raises:
            ValueError: a file is missing, or a value has no meaning.
        """
        if self.training is not None and self.validation is None:
            raise ValueError("--training-text is for the unigram model on --validation-text: give that too")
        for prompt in self.prompts:
            try:
                check_text(prompt)
            except ValueError as fault:
                raise ValueError(f"--prompt {prompt!r}: {fault}; give text in UTF-8") from fault
        input_bytes([str(path) for path in (self.validation, self.training) if path is not None])
        sizes = {
            "length": self.length,
            "max-tokens": self.max_tokens,
            "sample-tokens": self.num_sample_tokens,
        }
        for flag, size in sizes.items():
            if size < 1:
                raise ValueError(f"--{flag} {size}: at least 1")

        if self.validation is not None and self.max_tokens < self.length:
            raise ValueError(
                f"--max-tokens {self.max_tokens}: less than one window of --length {self.length}; raise it or shorten "
                "that"
            )

    @property
    def is_asked(self) -> bool:
        """Whether there is a text to score or a prompt to continue."""
        return self.validation is not None or bool(self.prompts)

    def check_length(self, positions: float, prompt_lengths: list[int]) -> None:
        """Refuse texts that are longer than the positions of a model.

        Raises:
            ValueError: names the lengths and the flags.
        """
        if self.validation is not None and self.length > positions:
            raise ValueError(
                f"--length {self.length}: a model has {positions} positions; give as many or fewer"
            )
        longest = max(prompt_lengths, default=0)
        if self.prompts and longest + self.num_sample_tokens > positions:
            raise ValueError(
                f"--prompt has {longest} tokens and --sample-tokens is {self.num_sample_tokens}: more than a model's "
                f"{positions} positions"
            )
