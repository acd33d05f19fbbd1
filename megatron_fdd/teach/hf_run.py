"""Running a model of transformers: its inputs, and hooks on its layers. B rows, S sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def tapped(layers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Give a list to which each of some layers adds its output when it runs."""
    found: list[Tensor] = []

    def keep(_module: nn.Module, _given: Any, output: Any) -> None:
        found.append(first_tensor(output))

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def handed_on(layers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Give a list to which each of some layers adds the hidden states that it is given when it runs."""
    found: list[Tensor] = []

    def keep(_module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        states = first_tensor(given)
        found.append(named["hidden_states"] if states is None else states)

    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def run_without_head(model: Any, ids_BS: Tensor) -> None:
    """Run a model's layers on rows that are padded on the right, each one text; there is no mask, and no logits.

    Raises:
        ValueError: the model's code fails; says how.
    """
    with in_one_line(model, ids_BS):
        model.base_model(input_ids=ids_BS)


@contextmanager
def in_one_line(model: Any, ids_BS: Tensor) -> Iterator[None]:
    """Make what a model's code raises on some rows an error for people. Memory that runs out is another matter."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # anything, from a missing input to a position without an embedding
        reason = " ".join(str(error).split())
        raise ValueError(
            f"--teacher: a {type(model).__name__} does not run on rows of {ids_BS.shape[1]} tokens "
            f"({type(error).__name__}: {reason}): give another --dtype or a shorter --seq-length, or choose another "
            "teacher (docs/teacher-types.md)"
        ) from error


def input_device(model: Any) -> torch.device:
    """Return where token ids go; modules whose weights are elsewhere between two passes fetch their inputs."""
    place: torch.device = model.get_input_embeddings().weight.device
    return torch.device("cpu") if place.type == "meta" else place


def first_tensor(output: Any) -> Any:
    """Return the first tensor of what a module takes or gives; None if it is none of floating point."""
    if isinstance(output, tuple | list):
        output = output[0] if output else None
    return output if isinstance(output, Tensor) and output.is_floating_point() else None
