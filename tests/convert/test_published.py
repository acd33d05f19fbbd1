"""The configs of published models: the conversion understands them and finds the published sizes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from megatron_fdd.convert.families import family_of
from megatron_fdd.convert.mcore_model import build_model, complete_args
from megatron_fdd.convert.ranks import conversion_ranks
from tests.convert.published import _SAME, PUBLISHED
from tests.harness.ranks import Layout, run_on_ranks

pytestmark = pytest.mark.tier("default")

_SAME |= {"transformers_version": "4.51.0", "use_cache": True, "tie_word_embeddings": False}


def _count_parameters(config: dict[str, Any]) -> int:
    """Count, on one rank, the elements that the table exports, and check that Megatron has the same names."""
    family = family_of(config)
    architecture = family.megatron_args(config)
    with conversion_ranks() as groups:
        args = complete_args({**family.fixed, **architecture}, dtype=torch.bfloat16, vocabulary_divisor=128)
        from megatron_fdd.convert.checkpoint_entries import tensors_of

        parameters = tensors_of(build_model(args, groups, "meta"))
    rows = family.rows(config)
    assert {row.mcore for row in rows} == set(parameters)
    padding = args.padded_vocab_size - architecture["vocab_size"]
    padded = sum(padding * parameters[row.mcore].shape[1] for row in rows if row.vocabulary)
    return sum(parameters[row.mcore].numel() for row in rows if row.sources) - padded


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("Llama-3.2-1B", 1498.5),  # 1,236 with the tied embeddings, which this config unties
        ("Mistral-7B-v0.1", 7241.7),
        ("Qwen2.5-7B", 7615.6),
        ("Qwen3-1.7B", 2031.7),  # 1,721 with tied embeddings
        ("Mixtral-8x7B-v0.1", 46702.8),
        ("Qwen3-30B-A3B", 30532.1),
        ("OLMo-2-0425-1B", 1484.9),
        ("gemma-2-2b", 2614.3),
        ("gemma-3-1b", 999.9),
        ("SmolLM3-3B", 3075.1),
        ("phi-4", 14659.5),
        ("Qwen1.5-MoE-A2.7B", 14315.8),
        ("gpt-oss-20b in bfloat16", 20914.8),
        ("starcoder2-3b", 3030.4),
        ("DeepSeek-V2-Lite", 15706.5),
        ("granite-3.1-1b-a400m", 1384.9),  # 1,334.6 with tied embeddings
        ("GLM-4-9B-0414", 9400.3),
        ("EXAONE-4.0-32B", 32003.2),
        ("OLMoE-1B-7B", 6919.2),
        ("Olmo-3-7B", 7298.0),
        ("ERNIE-4.5-21B-A3B", 21825.4),
        ("c4ai-command-r7b", 8028.0),
        ("gpt2-xl", 1557.6),
    ],
)
def test_published_models(name: str, millions: float) -> None:
    """The conversion understands their configs, and the tables have the published numbers of parameters."""
    [count] = run_on_ranks(_count_parameters, Layout(ranks=1), {"config": PUBLISHED[name]})
    assert count / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if not name.startswith("Kimi")])
def test_configs_that_transformers_has_written_again(name: str) -> None:
    """A fine-tuned model has the config that transformers 5 writes: other names of fields, and their defaults."""
    from transformers import AutoConfig

    config = PUBLISHED[name]
    written = json.loads(AutoConfig.for_model(**config).to_json_string())
    assert family_of(written).megatron_args(written) == family_of(config).megatron_args(config)
