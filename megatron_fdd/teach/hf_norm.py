"""The final norm of a model of transformers, measured: of which kind it is, with which weight, bias and epsilon.

T the model's width.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import get_args

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn

from megatron_fdd.data.store.lens import LARGEST_ERROR, NormKind, StoredNorm, relative_error
from megatron_fdd.losses.lens import FinalNorm

# Sizes of inputs: with the least one the epsilon shows, with the largest it does not.
_SIZES = (1e-3, 1e-1, 1.0, 30.0)
_ROWS = 8
# Epsilons that some norms have in their code, not as an attribute.
_USUAL_EPSILONS = (1e-5, 1e-6, 1e-8, 1e-12, torch.finfo(torch.float32).eps)
_LARGEST_EPSILON = 1e-2


def real_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's own parameters, also of one whose weights are elsewhere between two forward passes."""
    is_away = has_offloaded_params(module)
    with align_module_device(module):
        own = module.named_parameters(recurse=False)
        return {name: tensor.detach().clone() if is_away else tensor.detach() for name, tensor in own}


def measure_norm(module: nn.Module, name: str, like_BST: Tensor) -> tuple[StoredNorm, str, Tensor]:
    """Find out what a norm does, by running it.

    Args:
        name: of the module, for messages.
        like_BST: a hidden state as the module gets it.

    Returns:
        The norm; and the name and the values of the parameter behind its factor, as the model stores it: no name and
        ones where it has none.

    Raises:
        ValueError: it is neither an RMSNorm nor a LayerNorm, of each token over its whole width.
    """
    width = like_BST.shape[-1]
    given_RT = _inputs(width)
    what = f"--teacher: its last norm, {name} ({type(module).__name__}),"
    try:
        wanted_RT = module(given_RT[None].to(like_BST))[0].float().cpu()
    except Exception as failure:  # a module of any kind
        raise ValueError(
            f"{what} needs more than hidden states ({failure}): choose another teacher (docs/teacher-types.md)"
        ) from failure
    seen_RT = given_RT.to(like_BST.dtype).float()
    tensors = {name: tensor.float().cpu() for name, tensor in real_tensors(module).items()}
    epsilons = {value for value in vars(module).values() if isinstance(value, float)}
    best: tuple[float, StoredNorm] | None = None
    for weight_T, bias_T in _weights(list(tensors.values()), width):
        for kind, epsilon in itertools.product(get_args(NormKind), sorted({*epsilons, *_USUAL_EPSILONS})):
            if not 0 < epsilon <= _LARGEST_EPSILON:
                continue
            error = relative_error(FinalNorm(weight_T, bias_T, epsilon, kind)(seen_RT), wanted_RT)
            if best is None or error < best[0]:
                best = error, StoredNorm(kind, weight_T, bias_T, epsilon)
    if best is None or not best[0] <= LARGEST_ERROR[like_BST.dtype]:
        found = "it has other tensors than a weight and a bias" if best is None else f"off by {best[0]:.1e}"
        raise ValueError(
            f"{what} is neither an RMSNorm nor a LayerNorm ({found}): choose another teacher (docs/teacher-types.md)"
        )
    return best[1], *next(iter(tensors.items()), ("", torch.ones(width)))


def _inputs(width: int) -> Tensor:
    """Return rows [R, T] of different sizes, whose mean is not zero."""
    rows_RT = torch.randn(_ROWS * len(_SIZES), width, generator=torch.Generator().manual_seed(0)) + 0.3
    return rows_RT * torch.tensor(_SIZES).repeat_interleave(_ROWS)[:, None]


def _weights(tensors: list[Tensor], width: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield what a norm with these parameters may multiply with, and what it may add."""
    if any(tensor.shape != (width,) for tensor in tensors) or len(tensors) > 2:
        return
    if not tensors:
        yield torch.ones(width), None
        return
    bias_T = tensors[1] if len(tensors) == 2 else None
    yield tensors[0], bias_T
    yield 1 + tensors[0], bias_T
