"""A training script's own student must have the sizes that the flags describe."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_fdd.host.model import check_same_sizes


def config(**changes: Any) -> Any:
    """A configuration with the fields that are compared."""
    sizes = {"num_layers": 4, "hidden_size": 32} | changes
    tied = sizes.pop("share_embeddings_and_output_weights", False)
    return SimpleNamespace(transformer=SimpleNamespace(**sizes), share_embeddings_and_output_weights=tied)


def test_the_same_sizes_pass() -> None:
    check_same_sizes(config(), config())


@pytest.mark.parametrize(
    ("name", "value"), [("num_layers", 5), ("hidden_size", 64), ("share_embeddings_and_output_weights", True)]
)
def test_another_size_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"Parts\.student: .*: {name} is {value} in it and .* by the flags"):
        check_same_sizes(config(**{name: value}), config())


def test_a_student_that_is_no_config_is_refused() -> None:
    with pytest.raises(ValueError, match="Parts.student returned None; it must return a GPTModelConfig"):
        check_same_sizes(None, config())  # type: ignore[arg-type]
