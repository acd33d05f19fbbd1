"""Answers to instructions: prompts to token ids, batches of them to texts.

What a model answers depends on the seed and on the example alone, never on the batch an example is in, on the
others of a run, or on where a run was interrupted (but for the rounding of a batch of another shape): every
example draws its random numbers from a generator of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

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
from megatron_fdd.evaluate.models import begun, check_finite, end_ids, leading_ids, plain_generation
from megatron_fdd.evaluate.settings import GenerationSettings


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model is given for one example; `is_cut` says that the prompt had more tokens than it may have."""

    number: int
    ids: list[int]
    is_cut: bool


def encode_prompts(
    examples: dict[int, Instruction], tokenizer: PreTrainedTokenizerBase, settings: GenerationSettings
) -> list[Prompt]:
    """Token ids as in training: the tokenizer's beginning-of-sequence token where it puts one, then the text.

    Raises:
        ValueError: the chat template is missing or refuses an example; an example without any token.
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
        ids = begun(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], before)
        if not ids:
            raise ValueError(
                f"example {number} (from 0) is empty, and the tokenizer puts nothing before it: there is nothing to "
                "answer; leave it out or give it a template"
            )
        kept = ids[: settings.max_prompt_tokens]
        prompts.append(Prompt(number, kept, is_cut=len(ids) > len(kept)))
    return prompts


def _chat_sampler(tokenizer: PreTrainedTokenizerBase, settings: GenerationSettings) -> ChatSampler:
    """What training makes conversations with."""
    template = settings.chat_template or tokenizer.chat_template
    if not template:
        raise ValueError(
            "--template chat: this tokenizer has no chat template; give one with --chat-template"
        )
    eod, bos = (-1 if each is None else each for each in (tokenizer.eos_token_id, tokenizer.bos_token_id))
    text = HuggingFaceText(template, eod, bos, (), tokenizer)
    return ChatSampler(text.chat(settings.chat), settings.chat)


def _chat_text(example: Instruction, sampler: ChatSampler) -> str:
    messages = example.messages()
    asked = Conversation(tuple(messages), (False,) * len(messages))
    try:
        return sampler.prompt(asked)
    except Exception as error:  # a template is a program from somewhere
        raise ValueError(f"--template chat: the chat template refuses an instruction: {error}") from error


def check_length(prompts: Iterable[Prompt], max_new_tokens: int, positions: float) -> None:
    """Refuse what a model has no positions for.

    Raises:
        ValueError: names lengths and flags.
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
        """The scores as they are."""
        self.found |= scores.isnan().any()
        return scores


class SamplingProcessor(LogitsProcessor):
    """Makes the most probable token a random one, drawn with the probabilities that the scores mean.

    p / e with e ~ Exp(1) is largest at each token with its probability p (as in torch.multinomial); each row has
    a generator of its own.
    """

    def __init__(self, seeds: Iterable[int], device: torch.device) -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores [batch, vocabulary] less the logarithms of fresh exponential numbers, in float32."""
        noise = torch.empty(scores.shape, dtype=torch.float32, device=scores.device)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores.float() - noise.log()  # type: ignore[return-value]


def example_seed(seed: int, number: int) -> int:
    """The seed of one example: far from those of its neighbours, as generators want it."""
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
        # The model's own generation config fills in whatever a call leaves open, so it is replaced, not passed.
        model.generation_config = plain_generation(self.ends, settings.max_new_tokens)

    @torch.inference_mode()
    def answer(self, batch: list[Prompt], seed: int) -> list[str]:
        """The answers of one batch, without what follows an end token, stripped.

        Raises:
            ValueError: the model predicts no numbers.
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
