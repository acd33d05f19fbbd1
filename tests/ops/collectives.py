"""Parameters that every rank holds, and the collectives that a piece of code makes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Copied(torch.autograd.Function):
    """A parameter that all ranks hold whole, each using a part: the parts' gradients are summed."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient


class Collectives(TorchDispatchMode):
    """A record of every collective, with the bytes that this rank contributes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            # (output, input, ...) for gather and scatter, (tensors, ...) for all-reduce
            given = args[1] if isinstance(args[1], Tensor) else args[0]
            size = sum(leaf.nbytes for leaf in tree_leaves(given) if isinstance(leaf, Tensor))
            self.seen.append((func.overloadpacket.__name__.strip("_"), size))
        return func(*args, **(kwargs or {}))


@contextmanager
def expect(collectives: list[tuple[str, int]]) -> Iterator[None]:
    """Assert exactly these collectives, in this order."""
    with Collectives() as mode:
        yield
    assert mode.seen == collectives
