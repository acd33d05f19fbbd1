"""Records of what a rank sends and which collectives it takes part in, by phase of a step, to count them in tests."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

SENDS = ("isend", "send")
RECEIVES = ("irecv", "recv")
COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "reduce",
    "reduce_scatter_tensor",
)


@dataclass(frozen=True)
class Message:
    """One call of torch.distributed.

    Attributes:
        kind: the function's name.
        phase: the innermost phase that was open.
        is_ours: true if the package made the call, not Megatron.
        group: key of the process group in `Traffic.groups`; "other" for any other group.
        shape: the shape of the first tensor that is passed (for an all-gather the result, flat or not).
    """

    kind: str
    phase: str
    is_ours: bool
    group: str
    shape: tuple[int, ...]
    num_bytes: int


class Traffic:
    """Records every call made inside `watching()`."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.groups: dict[str, Any] = {}
        self._phases = ["before"]
        self._is_inside = False

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name the phase of the calls inside a `with` statement."""
        self._phases.append(name)
        try:
            yield
        finally:
            self._phases.pop()

    def in_phase(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `function` so that its messages belong to that phase."""

        @functools.wraps(function)
        def run(*arguments: Any, **keywords: Any) -> Any:
            with self.phase(name):
                return function(*arguments, **keywords)

        return run

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Record calls inside a `with` statement."""
        with contextlib.ExitStack() as stack:
            for name in (*SENDS, *RECEIVES, *COLLECTIVES):
                counted = self._counted(name, getattr(dist, name))
                # Batched sends compare their function with the one in its defining module.
                for module in (dist, distributed_c10d):
                    stack.enter_context(patch.object(module, name, counted))
            yield

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **keywords: Any) -> Any:
            if self._is_inside:  # a blocking send calls one that does not block
                return function(*arguments, **keywords)
            self._record(name, arguments, keywords)
            self._is_inside = True
            try:
                return function(*arguments, **keywords)
            finally:
                self._is_inside = False

        return call

    def _record(self, name: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        tensors = [value for value in (*arguments, *keywords.values()) if isinstance(value, torch.Tensor)]
        tensor: Tensor = tensors[0] if tensors else torch.empty(0)
        group = keywords.get("group")
        names = [key for key, value in self.groups.items() if value is group]
        self.messages.append(
            Message(
                kind=name,
                phase=self._phases[-1],
                is_ours=_is_ours(_caller()),
                group=names[0] if names else "other",
                shape=tuple(tensor.shape),
                num_bytes=tensor.numel() * tensor.element_size(),
            )
        )


def _is_ours(module: str) -> bool:
    """Whether a module belongs to the package.

    The rehearsal does not count: it only does what the hardware does for Megatron's own calls.
    """
    return module.startswith("megatron_fdd.") and not module.startswith("megatron_fdd.host.rehearsal.")


def _caller() -> str:
    """Return the name of the module that called torch."""
    frame = sys._getframe(1)
    while frame.f_globals["__name__"] == __name__ or frame.f_globals["__name__"].startswith("torch."):
        assert frame.f_back is not None
        frame = frame.f_back
    return frame.f_globals["__name__"]
