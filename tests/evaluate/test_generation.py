"""How models are asked: prompts, greedy answers, and random ones that depend on seed and example alone."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_fdd.data.instructions import Instruction
from megatron_fdd.evaluate.generation import (
    Generator,
    Prompt,
    SamplingProcessor,
    check_length,
    encode_prompts,
    example_seed,
)
from megatron_fdd.evaluate.models import Placement
from megatron_fdd.evaluate.settings import GenerationSettings
from tests.convert.toys import make_llama, write_json

CPU = Placement("cpu", "float32")
SETTINGS = GenerationSettings(max_prompt_tokens=24, max_new_tokens=10)
GREEDY = GenerationSettings(temperature=0, max_prompt_tokens=24, max_new_tokens=10)
EXAMPLES = {
    number: Instruction("the quick brown fox " * (number % 4) + "a student", "", ("x",), is_prompt=True)
    for number in range(7)
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("models") / "toy")


def generator(folder: Path, settings: GenerationSettings) -> tuple[Generator, list[Prompt]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Generator(CPU.load(folder), tokenizer, settings), encode_prompts(EXAMPLES, tokenizer, settings)


def answers(folder: Path, settings: GenerationSettings, batch_size: int, seed: int = 10) -> list[str]:
    asked, prompts = generator(folder, settings)
    found: list[str] = []
    for start in range(0, len(prompts), batch_size):
        found += asked.answer(prompts[start : start + batch_size], seed)
    return found


def test_greedy_answers_are_those_of_each_prompt_alone(folder: Path) -> None:
    asked, prompts = generator(folder, GREEDY)
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt.ids])
        with torch.no_grad():
            for _ in range(GREEDY.max_new_tokens):
                ids = torch.cat([ids, asked.model(ids).logits[:, -1:].argmax(-1)], dim=1)
        text = asked.tokenizer.decode(ids[0, len(prompt.ids) :], skip_special_tokens=True)
        expected.append(text.strip())
    assert len(set(expected)) > 1
    for batch_size in (1, 3, 7):
        assert answers(folder, GREEDY, batch_size) == expected


def test_random_answers_depend_on_seed_and_example_alone(folder: Path) -> None:
    together = answers(folder, SETTINGS, 7)
    assert answers(folder, SETTINGS, 2) == together
    assert answers(folder, SETTINGS, 7, seed=20) != together
    # Examples 0 and 4 are the same text.
    assert together[0] != together[4]
    torch.manual_seed(1)
    assert answers(folder, SETTINGS, 7) == together


def test_what_a_generation_config_asks_for_has_no_effect_but_its_ends(folder: Path, tmp_path: Path) -> None:
    plain = answers(folder, SETTINGS, 7)
    other = make_llama(tmp_path / "other")
    config = {"temperature": 0.1, "top_k": 1, "do_sample": True, "repetition_penalty": 9.0, "max_length": 3}
    write_json(other / "generation_config.json", {**config, "eos_token_id": 2})
    assert answers(other, SETTINGS, 7) == plain

    asked, prompts = generator(folder, GREEDY)
    longest = asked.answer(prompts[:1], 10)[0]
    written = asked.tokenizer(longest, add_special_tokens=False)["input_ids"]
    end = written[2]
    write_json(other / "generation_config.json", {"eos_token_id": [2, end]})
    shorter = answers(other, GREEDY, 7)[0]
    assert longest.startswith(shorter)
    assert asked.tokenizer(shorter, add_special_tokens=False)["input_ids"] == written[: written.index(end)]


def test_little_of_the_distribution_is_greedy(folder: Path) -> None:
    greedy = answers(folder, GREEDY, 7)
    sizes = {"max_prompt_tokens": 24, "max_new_tokens": 10}
    assert answers(folder, GenerationSettings(top_p=1e-6, **sizes), 7) == greedy
    assert answers(folder, GenerationSettings(temperature=1e-4, **sizes), 7) == greedy


def test_tokens_are_drawn_with_their_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    count = 4000
    sampler = SamplingProcessor((example_seed(10, number) for number in range(count)), torch.device("cpu"))
    scores = probabilities.log().expand(count, -1)
    for _ in range(2):  # every row's generator continues
        drawn = sampler(None, scores).argmax(-1).bincount(minlength=4) / count
        torch.testing.assert_close(drawn, probabilities, atol=0.03, rtol=0)


def test_prompts_begin_as_in_training_and_lose_their_end(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = {0: Instruction("a student follows", "its teacher", ("x",))}
    whole = encode_prompts(text, tokenizer, GenerationSettings(max_prompt_tokens=500))[0]
    cut = encode_prompts(text, tokenizer, GenerationSettings(max_prompt_tokens=9))[0]
    assert whole.ids == tokenizer(text[0].prompt("alpaca"))["input_ids"]
    assert (cut.ids, cut.is_cut, whole.is_cut) == (whole.ids[:9], True, False)
    chat = encode_prompts(text, tokenizer, GenerationSettings(template="chat"))[0]
    bare = encode_prompts(text, tokenizer, GenerationSettings(template="none"))[0]
    assert chat.ids == bare.ids == tokenizer("a student follows\n\nits teacher")["input_ids"]
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert encode_prompts(text, tokenizer, GenerationSettings(template="none"))[0].ids == [1, *bare.ids]
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="--template chat: this tokenizer has no chat template"):
        encode_prompts(text, tokenizer, GenerationSettings(template="chat"))


def test_refused(folder: Path) -> None:
    _, prompts = generator(folder, SETTINGS)
    check_length(prompts, 40, math.inf)
    with pytest.raises(
        ValueError, match=r"longest prompt has \d+ tokens .* is 60: more than .* 64 positions"
    ):
        check_length(prompts, 60, 64)
    for change, message in (
        ({"temperature": -1.0}, "--temperature -1.0: a number, 0 or more"),
        ({"temperature": math.inf}, "--temperature inf: a number, 0 or more"),
        ({"top_p": 0.0}, "--top-p 0.0: above 0"),
        ({"seeds": (1, 1)}, "--seeds .*different"),
    ):
        with pytest.raises(ValueError, match=message):
            GenerationSettings(**change).check()


def test_an_example_without_a_token_is_refused_unless_something_stands_before_it(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    empty = {3: Instruction("", "", ("x",), is_prompt=True)}
    with pytest.raises(ValueError, match=r"example 3 \(from 0\) is empty"):
        encode_prompts(empty, tokenizer, SETTINGS)
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert encode_prompts(empty, tokenizer, SETTINGS)[0].ids == [1]


@pytest.mark.parametrize("settings", [SETTINGS, GREEDY])
def test_a_model_that_predicts_no_numbers_is_refused(folder: Path, settings: GenerationSettings) -> None:
    asked, prompts = generator(folder, settings)
    asked.model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=rf"{folder} predicts NaN"):
        asked.answer(prompts[:2], 10)
