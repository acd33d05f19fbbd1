"""A student's answers by vLLM, in the files and with the seeds of `fdd evaluate`. NEVER RUN: it needs a GPU.

    python examples/on-policy/vllm_answers.py --hf-model own=DIR --data prompts=FILE --template chat --seeds 1 --out DIR

Flags as those of `fdd evaluate`, which does this by transformers; --engine-args is JSON for vLLM's class LLM. The
sampled tokens are others than those of transformers. A killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_fdd.data.instructions import TEMPLATES
from megatron_fdd.evaluate.answers import Answer, AnswersFile, batches_by_length
from megatron_fdd.evaluate.data_file import Selection, read_data_file
from megatron_fdd.evaluate.generation import Prompt, check_length, encode_prompts, example_seed
from megatron_fdd.evaluate.models import NamedModel, num_positions
from megatron_fdd.evaluate.named_path import split_name
from megatron_fdd.evaluate.settings import GenerationSettings
from megatron_fdd.host.disk import explain

# Prompts whose answers are written together; vLLM schedules them itself.
_BATCH = 4096


def answer(llm: Any, batch: Sequence[Prompt], settings: GenerationSettings, seed: int) -> list[Answer]:
    """Return the answers of one batch. vLLM gets token ids, and adds none."""
    from vllm import SamplingParams

    outputs = llm.generate(
        [{"prompt_token_ids": prompt.ids} for prompt in batch],
        [
            SamplingParams(
                temperature=settings.temperature,
                top_p=settings.top_p,
                max_tokens=settings.max_new_tokens,
                seed=example_seed(seed, prompt.number) % 2**31,
            )
            for prompt in batch
        ],
    )
    texts = [output.outputs[0].text.strip() for output in outputs]
    return [Answer(prompt.number, text, 0.0) for prompt, text in zip(batch, texts, strict=True)]


def run(given: argparse.Namespace) -> None:
    """Answer what is not answered yet; vLLM is imported only then.

    Raises:
        ValueError: vLLM is not installed, a prompt and its answer do not fit, or existing answers have other settings.
    """
    model = NamedModel(*_named(given.hf_model))
    name, path = _named(given.data)
    settings = GenerationSettings(
        template=given.template,
        seeds=(given.seeds,),
        temperature=given.temperature,
        max_prompt_tokens=given.max_prompt_tokens,
        max_new_tokens=given.max_new_tokens,
        chat_template_kwargs=given.chat_template_kwargs,
    )
    settings.check()
    model.check()
    data = read_data_file(name, path, Selection())
    prompts = encode_prompts(data.examples, model.tokenizer(), settings)
    check_length(prompts, settings.max_new_tokens, num_positions(model.config()))
    made_with = {"engine": "vllm", "model": model.fingerprint(), "data": data.sha256, "seed": given.seeds}
    made_with |= {key: getattr(settings, key) for key in ("template", "temperature", "max_new_tokens")}
    file = AnswersFile(given.out / model.name / "answers" / f"{name}.seed{given.seeds}.jsonl", made_with)
    todo = file.open_batches(batches_by_length(prompts, _BATCH))
    if todo:
        try:
            from vllm import LLM
        except ImportError as error:
            raise ValueError(f"GENERATE=vllm: vllm cannot be imported ({error}); install it") from error
        llm = LLM(model=str(model.folder), **given.engine_args)
        for batch in todo:
            file.append(answer(llm, batch, settings, given.seeds))
    file.finish(data.examples)


def _named(value: str) -> tuple[str, Path]:
    name, path = split_name(value)
    return name or Path(path).stem, Path(path)


def main() -> int:
    """Parse the command line and answer; 1 and one line if something is refused."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--hf-model", required=True, metavar="NAME=DIR")
    parser.add_argument("--data", required=True, metavar="NAME=FILE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--template", choices=TEMPLATES, required=True)
    parser.add_argument("--chat-template-kwargs", type=json.loads, default={}, metavar="JSON")
    parser.add_argument("--seeds", type=int, required=True, help="one seed")
    parser.add_argument("--temperature", type=float, required=True)
    parser.add_argument("--max-prompt-tokens", type=int, required=True)
    parser.add_argument("--max-new-tokens", type=int, required=True)
    parser.add_argument("--engine-args", type=json.loads, default={}, metavar="JSON")
    try:
        run(parser.parse_args())
    except (ValueError, OSError) as error:
        print(f"vllm_answers: error: {explain(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
