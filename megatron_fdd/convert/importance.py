"""How much the parts of a model matter, by its activations on a text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from megatron_fdd.convert.families.family import Family, HfConfig, MegatronArgs
from megatron_fdd.convert.parameter_axes import Axis, axes_of, key_of
from megatron_fdd.convert.student_sizes import architecture, flag_of
from megatron_fdd.host.bar import Bar


class Side(Enum):
    """Which activations of a module are looked at."""

    INPUT = "input"
    OUTPUT = "output"


@dataclass(frozen=True, slots=True)
class Probe:
    """A place in transformers' model where channels are scored.

    Attributes:
        key: of `key_of`; the scores of all probes with one key are added.
        module: path of the module.
        num_channels: of its activations.
    """

    key: str
    module: str
    side: Side
    num_channels: int


# Which axis the sizes of a student cut.
_AXIS_OF = {
    "hidden_size": Axis.HIDDEN,
    "ffn_hidden_size": Axis.FFN,
    "num_attention_heads": Axis.HEADS,
    "num_query_groups": Axis.HEADS,
}


def probes_of(
    family: Family, config: HfConfig, layers: Sequence[int], sizes: Mapping[str, int]
) -> list[Probe]:
    """List the places that tell which parts to keep.

    Hidden channels are scored by the outputs of norms, those of an MLP and heads by the inputs of the matrix behind
    them.

    Args:
        layers: numbers of the layers that are kept.
        sizes: the student's, by the names in `SIZES`.

    Raises:
        ValueError: there is no place that a size cuts.
    """
    kept = tuple(f"decoder.layers.{layer}." for layer in layers)
    found: dict[Axis, list[Probe]] = {_AXIS_OF[size]: [] for size in sizes}
    args = architecture(family, config)
    for row in family.rows(config) if sizes else ():
        is_kept = row.mcore.startswith(kept) or not row.mcore.startswith("decoder.layers.")
        if not is_kept or not row.mcore.endswith(".weight") or not row.sources or "experts." in row.mcore:
            continue
        axes = axes_of(row.mcore)
        is_norm = axes == (Axis.HIDDEN,)
        axis = axes[-1] if is_norm or axes[-1] is not Axis.HIDDEN else Axis.WHOLE
        if axis in found:
            module, side = row.sources[0].removesuffix(".weight"), Side.OUTPUT if is_norm else Side.INPUT
            found[axis].append(Probe(key_of(axis, row.mcore), module, side, _width(axis, args)))
    for size, value in sizes.items():
        if not found[_AXIS_OF[size]]:
            raise ValueError(
                f"{flag_of(size)} {value}: no layer that is kept has such channels; leave it out"
            )
    return [probe for probes in found.values() for probe in probes]


def _width(axis: Axis, args: MegatronArgs) -> int:
    """Return the number of channels along an axis."""
    if axis is Axis.HEADS:
        return int(args["num_attention_heads"] * args["kv_channels"])
    return int(args["hidden_size"] if axis is Axis.HIDDEN else args["ffn_hidden_size"])


def measure_importance(
    model: nn.Module, probes: Sequence[Probe], windows: Tensor, *, progress: bool = False
) -> dict[str, Tensor]:
    """Score channels by what they do on a text: |activation| averaged over a window; the root of the sum of squares.

    Args:
        model: transformers' model, in evaluation mode.
        windows: int64 [windows, tokens], one after the other.

    Returns:
        By the key of probes, the sum of their scores, float64 [channels], on the CPU.

    Raises:
        ValueError: transformers' model has another module, or a score is not finite.
    """
    squares: dict[Probe, Tensor] = {}
    bar = Bar(total=len(windows), desc="scoring", unit="windows", is_shown=progress)
    with torch.inference_mode(), _hooks(model, probes, squares), bar:
        for window in windows:
            model(window[None].to(next(model.parameters()).device), use_cache=False)
            bar.update(1)
    scores: dict[str, Tensor] = {}
    for probe, total in squares.items():
        score = total.double().cpu().sqrt()
        scores[probe.key] = scores.get(probe.key, 0.0) + score
    broken = [key for key, score in scores.items() if not score.isfinite().all()]
    if broken:
        raise ValueError(
            f"activations at {broken[0]} are not finite; the weights are damaged, so copy the model again"
        )
    return scores


@contextmanager
def _hooks(model: nn.Module, probes: Sequence[Probe], squares: dict[Probe, Tensor]) -> Iterator[None]:
    """Add to `squares` in each forward pass, for as long as the block runs."""
    handles = []

    def add(probe: Probe, activations: Tensor) -> None:
        mean = activations.detach().float().abs().flatten(0, -2).mean(0)
        squares[probe] = squares.get(probe, 0.0) + mean.square()

    def before(probe: Probe) -> Any:
        return lambda _module, inputs: add(probe, inputs[0])

    def after(probe: Probe) -> Any:
        return lambda _module, _inputs, output: add(probe, output)

    try:
        for probe in probes:
            module = _module(model, probe.module)
            if probe.side is Side.INPUT:
                handles.append(module.register_forward_pre_hook(before(probe)))
            else:
                handles.append(module.register_forward_hook(after(probe)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise ValueError(
            f"transformers' {type(model).__name__} has no module {path}, whose activations tell what to keep; choose "
            "layers alone"
        ) from None
