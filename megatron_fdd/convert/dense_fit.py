"""One MLP in place of a mixture of experts: its channels, and the second matrix that brings it nearest to the mixture.

Gate and up are rows of the experts, so that the MLP's activations A on a text are known. Its second matrix is the W
with the least |A W - Y|^2, where Y is what the mixture says there: (A'A + ridge) W = A'Y.
"""

# Legend: N tokens, H hidden, F channels of the MLP

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from megatron_fdd.convert.importance import each_expert, find_experts, find_module, read_windows
from megatron_fdd.convert.kept_parts import highest
from megatron_fdd.convert.mixtures import Mixture
from megatron_fdd.host.bar import Bar

# Beside the mean of the diagonal of A'A, for as many channels as tokens; with more tokens it is less.
_RIDGE = 0.1
# Bytes of sums that are held at once.
_MOST_BYTES = 4 * 2**30


def choose_channels(
    model: nn.Module, mixtures: Sequence[Mixture], width: int, windows: Tensor, *, progress: bool = False
) -> dict[int, Tensor]:
    """Choose the channels that do most on a text: those of the shared expert, then those of all experts.

    A channel's score is the square of its activation times the weight of its expert, averaged over tokens, times the
    square of the norm of its column of the expert's second matrix.

    Args:
        model: transformers' model, in evaluation mode.
        width: how many to choose in each layer.
        windows: int64 [windows, tokens].

    Returns:
        By number of the layer, int64 [width], increasing, on the CPU.

    Raises:
        ValueError: transformers' model has other modules, or an activation is not finite.
    """
    sums = {each.layer: torch.zeros(each.num_channels, dtype=torch.float64) for each in mixtures}
    with (
        ExitStack() as hooks,
        Bar(total=len(windows), desc="scoring", unit="window", is_shown=progress) as bar,
    ):
        for each in mixtures:
            _add_score_hooks(model, each, sums[each.layer], hooks)
        read_windows(model, windows, bar)
    chosen = {}
    for each in mixtures:
        scores = sums[each.layer] * _column_norms(model, each).square()
        _check_finite(scores, each)
        shared = highest(scores[: each.num_shared], width)
        others = highest(scores[each.num_shared :], width - len(shared))
        chosen[each.layer] = torch.cat([shared, each.num_shared + others])
    return chosen


def _add_score_hooks(model: nn.Module, mixture: Mixture, sums: Tensor, hooks: ExitStack) -> None:
    """Let each pass add the squares of activations times weights to `sums`, one for each channel."""

    def of_experts(module: Any, inputs: tuple[Tensor, ...], keywords: dict[str, Tensor]) -> None:
        for expert, gated, weights in each_expert(module, [*inputs, *keywords.values()]):
            sums[mixture.of_expert(expert)] += (gated.float() * weights).square().sum(0).double().cpu()

    def of_shared(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sums[: mixture.num_shared] += inputs[0].float().square().flatten(0, -2).sum(0).double().cpu()

    experts = find_experts(model, mixture.module)
    hooks.callback(experts.register_forward_pre_hook(of_experts, with_kwargs=True).remove)
    if mixture.shared:
        shared = find_module(model, mixture.shared)
        hooks.callback(shared.register_forward_pre_hook(of_shared).remove)


def _column_norms(model: nn.Module, mixture: Mixture) -> Tensor:
    """Return float64 [channels], the norms of the columns of the second matrices, on the CPU."""
    experts: Any = find_experts(model, mixture.module)
    dim = 1 if experts.is_transposed else 0
    norms = torch.cat([matrix.float().norm(dim=dim) for matrix in experts.down_proj.detach()])
    if mixture.shared:
        weight = find_module(model, mixture.shared).get_parameter("weight").detach()
        norms = torch.cat([weight.float().norm(dim=0), norms])
    return norms.double().cpu()


def fit_mlps(
    model: nn.Module,
    mixtures: Sequence[Mixture],
    first: Callable[[Mixture], Tensor],
    windows: Tensor,
    *,
    progress: bool = False,
) -> Iterator[tuple[Mixture, Tensor]]:
    """Fit the second matrices of MLPs so that they say on a text what the mixtures say that they replace.

    The sums of a layer are F x F. Those of as many layers as fit into 4 GiB are in memory; for the next ones the text
    is read again.

    Args:
        first: makes the first matrix of a mixture's MLP [2 F, H], gate and up.

    Yields:
        A mixture and the second matrix in its place, float64 [H, F], on the CPU.

    Raises:
        ValueError: transformers' model has other modules, or an activation is not finite.
    """
    rows, hidden = first(mixtures[0]).shape
    size = max(1, _MOST_BYTES // (8 * rows // 2 * (rows // 2 + hidden)))
    groups = [mixtures[start : start + size] for start in range(0, len(mixtures), size)]
    with Bar(total=len(groups) * len(windows), desc="fitting", unit="window", is_shown=progress) as bar:
        for group in groups:
            with ExitStack() as hooks:
                sums = [_add_sums(model, each, first(each), hooks) for each in group]
                read_windows(model, windows, bar)
            for each, total in zip(group, sums, strict=True):
                down = total.solve()
                _check_finite(down, each)
                yield each, down


@dataclass(slots=True)
class _Sums:
    """The sums of a layer: A'A, float64 [F, F], and A'Y, float64 [F, H]."""

    gram_FF: Tensor
    cross_FH: Tensor
    num_tokens: int = 0

    def add(self, activations_NF: Tensor, outputs_NH: Tensor) -> None:
        """Add some tokens."""
        self.gram_FF.addmm_(activations_NF.T, activations_NF)
        self.cross_FH.addmm_(activations_NF.T, outputs_NH)
        self.num_tokens += len(outputs_NH)

    def solve(self) -> Tensor:
        """Return W' [H, F] on the CPU."""
        diagonal = self.gram_FF.diagonal()
        ridge = _RIDGE * len(diagonal) / self.num_tokens * diagonal.mean()
        diagonal += ridge.clamp_min(torch.finfo(torch.float64).tiny)
        return torch.cholesky_solve(self.cross_FH, torch.linalg.cholesky(self.gram_FF)).T.cpu()


def _add_sums(model: nn.Module, mixture: Mixture, first: Tensor, hooks: ExitStack) -> _Sums:
    """Let each pass add its tokens to the sums of a layer, and return these."""
    experts = find_experts(model, mixture.module)
    block = next(each for each in find_module(model, mixture.module).children() if experts in each.modules())
    device = next(experts.parameters()).device
    first = first.to(device, torch.float32)
    width, hidden = len(first) // 2, first.shape[1]
    gram, cross = (torch.zeros(width, size, dtype=torch.float64, device=device) for size in (width, hidden))
    sums = _Sums(gram, cross)

    def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        gate, up = linear(inputs[0].flatten(0, -2).float(), first).chunk(2, dim=-1)
        sums.add((silu(gate) * up).double(), output.flatten(0, -2).double())

    hooks.callback(block.register_forward_hook(hook).remove)
    return sums


def _check_finite(values: Tensor, mixture: Mixture) -> None:
    """Refuse scores and weights that are not finite."""
    if not values.isfinite().all():
        raise ValueError(
            f"activations of the experts of layer {mixture.layer} are not finite; the weights are damaged, so copy the "
            "model again"
        )
