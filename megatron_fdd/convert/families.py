"""The families that can be converted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_fdd.convert import gpt2, llama
from megatron_fdd.convert.family import Family

FAMILIES = {family.model_type: family for family in (gpt2.GPT2, llama.LLAMA, llama.MISTRAL)}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that a config.json belongs to.

    Raises:
        ValueError: no family has this `model_type`.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(
            f'config.json says "model_type": {model_type!r}; the model types that can be converted are '
            f"{', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]
