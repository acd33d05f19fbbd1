"""Answers to instructions: from prompts to token ids, and from batches of them to texts.

A model's answer depends only on the seed and the example, because every example draws its random numbers from a
generator of its own. It does not depend on the batch, on the other examples of a run, or on where a run was
interrupted; only the rounding of a batch of another shape may differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from megatron_fdd.data.chat import ChatSampler
from megatron_fdd.data.conversations import Conversation
from megatron_fdd.data.instructions import Instruction
from megatron_fdd.data.tokenizer import HuggingFaceText
from megatron_fdd.data.tokenizer_identity import encoded_by
from megatron_fdd.evaluate.models import begun, check_finite, end_ids, leading_ids, plain_generation
from megatron_fdd.evaluate.settings import GenerationSettings


@dataclass(frozen=True, slots=True)
class Prompt:
    """The token ids that a model gets for one example; `is_cut` is true if the prompt was too long and was cut."""

    number: int
    ids: list[int]
    is_cut: bool


def encode_prompts(
    examples: dict[int, Instruction], tokenizer: PreTrainedTokenizerBase, settings: GenerationSettings
) -> list[Prompt]:
    """Return token ids as in training: the beginning-of-sequence token if the tokenizer puts one, then the text.

    Raises:
        ValueError: the chat template is missing or refuses an example; or an example has no token.
    """
    leading = leading_ids(tokenizer)
    sampler = _chat_sampler(tokenizer, settings) if settings.template == "chat" else None
    prompts = []
    for number, example in examples.items():
        if settings.template == "chat":
            assert sampler is not None
            before, text = [], _chat_text(example, sampler)
        else:
            before, text = leading, example.prompt(settings.template)
        ids = begun(encoded_by(tokenizer, [text])[0], before)
        if not ids:
            raise ValueError(
                f"example {number} (from 0) is empty, and the tokenizer puts nothing before it: there is nothing to "
                "answer; leave it out or give it a template"
            )
        kept = ids[: settings.max_prompt_tokens]
        prompts.append(Prompt(number, kept, is_cut=len(ids) > len(kept)))
    return prompts


def _chat_sampler(tokenizer: PreTrainedTokenizerBase, settings: GenerationSettings) -> ChatSampler:
    """Return what makes the samples of conversations in training."""
    template = settings.chat_template or tokenizer.chat_template
    if not template:
        raise ValueError(
            "--template chat: this tokenizer has no chat template; give one with --chat-template"
        )
    eod, bos = (-1 if each is None else each for each in (tokenizer.eos_token_id, tokenizer.bos_token_id))
    text = HuggingFaceText(template, eod, bos, (), tokenizer)
    place = "of --chat-template" if settings.chat_template else f"of {tokenizer.name_or_path}"
    chat = replace(settings.chat, place=place)
    return ChatSampler(text.chat(chat), chat)


def _chat_text(example: Instruction, sampler: ChatSampler) -> str:
    messages = example.messages()
    asked = Conversation(tuple(messages), (False,) * len(messages))
    try:
        return sampler.prompt(asked)
    except Exception as error:  # a template is somebody else's program
        raise ValueError(
            f"--template chat: {sampler.template.told} refuses an instruction: {error}"
        ) from error


def check_length(prompts: Iterable[Prompt], max_new_tokens: int, positions: float) -> None:
    """Refuse prompts and answers that are together longer than a model's positions.

    Raises:
        ValueError: names the lengths and the flags.
    """
    longest = max(len(prompt.ids) for prompt in prompts)
    if longest + max_new_tokens > positions:
        raise ValueError(
            f"the longest prompt has {longest} tokens and --max-new-tokens is {max_new_tokens}: more than the model's "
            f"{positions} positions; lower --max-prompt-tokens or --max-new-tokens"
        )


class NanCheck(LogitsProcessor):
    """Remembers whether any score was not a number, without a host synchronisation at each token."""

    def __init__(self, device: torch.device) -> None:
        self.found = torch.zeros((), dtype=torch.bool, device=device)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return the scores unchanged."""
        self.found |= scores.isnan().any()
        return scores


class SamplingProcessor(LogitsProcessor):
    """Turns greedy choice into sampling: the largest score becomes that of a random token, drawn by its probability.

    With e ~ Exp(1) for each token, p / e is largest at a token with its probability p (as in torch.multinomial);
    each row has a generator of its own.
    """

    def __init__(self, seeds: Iterable[int], device: torch.device) -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return the scores [batch, vocabulary] minus the logarithms of new exponential numbers, in float32."""
        noise = torch.empty(scores.shape, dtype=torch.float32, device=scores.device)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores.float() - noise.log()  # type: ignore[return-value]


def example_seed(seed: int, number: int) -> int:
    """Return the seed of one example, far from the seeds of its neighbours: generators need that."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:8]) >> 1


class Generator:
    """One model that answers prompts in batches."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: GenerationSettings
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings
        self.ends = end_ids(model, tokenizer)
        # The model's own generation config fills in what a call leaves open, so it is replaced, not passed.
        model.generation_config = plain_generation(self.ends, settings.max_new_tokens)

    @torch.inference_mode()
    def answer(self, batch: list[Prompt], seed: int) -> list[str]:
        """Return the answers of one batch, stripped, without the text after an end token.

        Raises:
            ValueError: a prediction of the model is not a number.
        """
        width = max(len(prompt.ids) for prompt in batch)
        padded = [[self.ends[0]] * (width - len(prompt.ids)) + prompt.ids for prompt in batch]
        mask = [[0] * (width - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in batch]
        device = self.model.device
        generate: Callable[..., Tensor] = self.model.generate  # type: ignore[assignment]  # annotated as a Tensor
        check = NanCheck(device)
        tokens = generate(
            input_ids=torch.tensor(padded, device=device),
            attention_mask=torch.tensor(mask, device=device),
            logits_processor=LogitsProcessorList([check, *self._sampling(batch, seed)]),
        )
        check_finite(self.model, not check.found)
        return [self._decode(row) for row in tokens[:, width:].tolist()]

    def _sampling(self, batch: list[Prompt], seed: int) -> LogitsProcessorList:
        processors = LogitsProcessorList()
        if self.settings.temperature == 0:
            return processors
        if self.settings.temperature != 1:
            processors.append(TemperatureLogitsWarper(self.settings.temperature))
        if self.settings.top_p < 1:
            processors.append(TopPLogitsWarper(self.settings.top_p))
        seeds = [example_seed(seed, prompt.number) for prompt in batch]
        processors.append(SamplingProcessor(seeds, self.model.device))
        return processors

    def _decode(self, ids: list[int]) -> str:
        end = next((place for place, token in enumerate(ids) if token in self.ends), len(ids))
        return str(self.tokenizer.decode(ids[:end], skip_special_tokens=True)).strip()
