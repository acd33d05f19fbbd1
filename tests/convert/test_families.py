"""Model types that cannot be converted: each refusal says why, and which types can be."""

from __future__ import annotations

import pytest
from transformers import CONFIG_MAPPING

from megatron_fdd.convert.families import FAMILIES, MULTIMODAL, NOT_EXPRESSIBLE, family_of


def _refusal(model_type: str | None) -> str:
    with pytest.raises(ValueError, match="model types that can be converted") as refused:
        family_of({"model_type": model_type})
    message = str(refused.value)
    assert all(known in message for known in (*FAMILIES, *MULTIMODAL))
    assert repr(model_type) in message
    assert "fdd teach --engine transformers" in message
    return message


@pytest.mark.parametrize("model_type", list(NOT_EXPRESSIBLE))
def test_each_thing_that_is_missing_is_named(model_type: str) -> None:
    message = _refusal(model_type)
    assert "nor a family here can describe" in message
    assert all(reason in message for reason in NOT_EXPRESSIBLE[model_type])


@pytest.mark.parametrize("model_type", ["mamba", None])
def test_an_unknown_model_type(model_type: str | None) -> None:
    message = _refusal(model_type)
    assert "can describe" not in message
    assert "table" not in message


def test_every_name_is_one_of_transformers_and_in_one_list() -> None:
    names = [*FAMILIES, *MULTIMODAL, *NOT_EXPRESSIBLE]
    assert len(set(names)) == len(names)
    assert set(names) - {"kimi_k2"} <= set(CONFIG_MAPPING)  # which is a deepseek_v3 by another name
