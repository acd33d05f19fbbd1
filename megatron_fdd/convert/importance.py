"""How much the parts of a model matter, by its activations on a text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megatron_fdd.convert.probes import Probe, Side
from megatron_fdd.host.bar import Bar

Add = Callable[[str, Tensor], None]


def measure_importance(
    model: nn.Module, probes: Sequence[Probe], windows: Tensor, *, progress: bool = False
) -> dict[str, Tensor]:
    """Score parts by what they do on a text: |activation| averaged over a window; the root of the sum of squares.

    An expert's activation is the norm of what it adds to a token, which is 0 for the tokens of other experts.

    Args:
        model: transformers' model, in evaluation mode.
        windows: int64 [windows, tokens], one after the other.

    Returns:
        By the key of probes, the sum of their scores, float64 [parts], on the CPU. Beside them by the names of norms
        in Megatron, what part of the square of a norm's input is in each channel, averaged over tokens.

    Raises:
        ValueError: transformers' model has another module, or a score is not finite.
    """
    sums: dict[tuple[Probe, str], Tensor] = {}
    with (
        _hooks(model, probes, sums),
        Bar(total=len(windows), desc="scoring", unit="window", is_shown=progress) as bar,
    ):
        read_windows(model, windows, bar)
    scores: dict[str, Tensor] = {}
    for (probe, key), total in sums.items():
        score = total.double().cpu()
        score = score / len(windows) if key == probe.norm else score.sqrt()
        scores[key] = scores.get(key, 0.0) + score
    broken = [key for key, score in scores.items() if not score.isfinite().all()]
    if broken:
        raise ValueError(
            f"activations at {broken[0]} are not finite; the weights are damaged, so copy the model again"
        )
    return scores


def read_windows(model: nn.Module, windows: Tensor, bar: Bar) -> None:
    """Let a model read a text, one window after the other, each a unit of `bar`; what it predicts is dropped."""
    with torch.inference_mode():
        for window in windows:
            model(window[None].to(next(model.parameters()).device), use_cache=False)
            bar.update(1)


@contextmanager
def _hooks(
    model: nn.Module, probes: Sequence[Probe], sums: dict[tuple[Probe, str], Tensor]
) -> Iterator[None]:
    """Add to `sums` in each forward pass, for as long as the block runs."""
    handles = []

    def adder(probe: Probe) -> Add:
        def add(key: str, value: Tensor) -> None:
            sums[probe, key] = sums.get((probe, key), 0.0) + value

        return add

    try:
        for probe in probes:
            module, add = _module(model, probe), adder(probe)
            if probe.side is Side.OUTPUT:
                handles.append(module.register_forward_hook(_of_norm(probe, add)))
            elif probe.side is Side.INPUT:
                handles.append(module.register_forward_pre_hook(_of_input(probe, add)))
            else:
                hook = _of_experts(probe, add)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mean_square(activations: Tensor) -> Tensor:
    """Return the square of the mean |activation| of each channel over all tokens."""
    return activations.float().abs().flatten(0, -2).mean(0).square()


def _of_norm(probe: Probe, add: Add) -> Callable[..., None]:
    def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        add(probe.key, _mean_square(output))
        # A token of zeros, such as one for padding, has the same part in each channel.
        squares = inputs[0].float().square().flatten(0, -2) + torch.finfo(torch.float32).tiny
        add(probe.norm, (squares / squares.sum(-1, keepdim=True)).mean(0))

    return hook


def _of_input(probe: Probe, add: Add) -> Callable[..., None]:
    return lambda _module, inputs: add(probe.key, _mean_square(inputs[0]))


def _of_experts(probe: Probe, add: Add) -> Callable[..., None]:
    """Run the experts once more, each on its tokens: transformers' module has them all in two tensors."""

    def hook(module: Any, inputs: tuple[Tensor, ...], keywords: dict[str, Tensor]) -> None:
        given = [*inputs, *keywords.values()]
        count = len(given[0])
        added = given[0].new_zeros(len(module.gate_up_proj), dtype=torch.float32)
        for expert, gated, weights in each_expert(module, given):
            output = _linear(module, "down_proj", expert, gated) * weights
            channels = gated.float().abs().sum(0) / count
            add(probe.expert_key(expert), channels.square())
            added[expert] = output.float().norm(dim=-1).sum() / count
        add(probe.key, added.square())

    return hook


def each_expert(module: Any, inputs: Sequence[Tensor]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Run the first matrices of experts that have tokens.

    Args:
        module: transformers' experts of a layer.
        inputs: its own: the hidden states, each token's experts, their weights.

    Yields:
        An expert, its activations [tokens, channels] and its weights [tokens, 1] on its tokens.
    """
    hidden_NH, chosen_NK, weights_NK = inputs[:3]
    for expert in chosen_NK.unique().tolist():
        tokens, place = (chosen_NK == expert).nonzero(as_tuple=True)
        gated = module._apply_gate(_linear(module, "gate_up_proj", expert, hidden_NH[tokens]))
        yield expert, gated, weights_NK[tokens, place, None]


def _linear(experts: Any, name: str, expert: int, inputs: Tensor) -> Tensor:
    """Return what one of an expert's matrices makes of its tokens."""
    weight = getattr(experts, name)[expert]
    output = inputs @ (weight if experts.is_transposed else weight.T)
    return output + getattr(experts, f"{name}_bias")[expert] if experts.has_bias else output


def _module(model: nn.Module, probe: Probe) -> nn.Module:
    """Return the module of a probe; of experts, the one in its layer that has them in two tensors."""
    return (find_experts if probe.side is Side.EXPERTS else find_module)(model, probe.module)


def find_module(model: nn.Module, path: str) -> nn.Module:
    """Return a module of transformers' model. ValueError if it has none there."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise _lacking(model, path) from None


def find_experts(model: nn.Module, path: str) -> nn.Module:
    """Return the module in a layer that has all its experts in two tensors. ValueError if it has none there."""
    for module in find_module(model, path).modules():
        if hasattr(module, "_apply_gate"):
            return module
    raise _lacking(model, path)


def _lacking(model: nn.Module, path: str) -> ValueError:
    return ValueError(
        f"transformers' {type(model).__name__} has no such module at {path}, whose activations tell what to keep; "
        "choose layers alone"
    )
