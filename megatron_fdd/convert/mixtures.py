"""The mixture of experts of one layer, as one MLP of all its channels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from megatron_fdd.convert.families.family import Family, HfConfig, MegatronArgs, WeightRow


@dataclass(frozen=True, slots=True)
class Mixture:
    """A layer's experts. Channels are numbered from 0: those of the shared expert, then of one expert after the other.

    Attributes:
        layer: number of the layer.
        module: path of the layer in transformers' model.
        first: row of the first matrix, gate and up, of the shared expert if there is one, then of each expert.
        widths: channels of each of these.
        shared: path of the second matrix of the shared expert in transformers' model; empty without one.
    """

    layer: int
    module: str
    first: tuple[WeightRow, ...]
    widths: tuple[int, ...]
    shared: str = ""

    @property
    def num_channels(self) -> int:
        """How many channels there are in all."""
        return sum(self.widths)

    @property
    def num_shared(self) -> int:
        """How many of them are the shared expert's."""
        return self.widths[0] if self.shared else 0

    def of_expert(self, expert: int) -> slice:
        """Return where the channels of one of the router's experts are."""
        start = self.num_shared + expert * self.widths[-1]
        return slice(start, start + self.widths[-1])

    def gathered(self, channels: Tensor) -> GatheredRows:
        """Return the rows of gate and up for some channels, in increasing order."""
        rows, kept = [], []
        for row, end, width in zip(self.first, accumulate(self.widths), self.widths, strict=True):
            within = channels[(channels >= end - width) & (channels < end)] - (end - width)
            if len(within):
                rows.append(row)
                kept.append(within)
        return GatheredRows(tuple(rows), tuple(kept))


@dataclass(frozen=True, slots=True)
class GatheredRows:
    """A first matrix, gate and up, whose rows are those of several experts.

    Attributes:
        rows: of the experts.
        kept: int64, numbers of each expert's channels.
    """

    rows: tuple[WeightRow, ...]
    kept: tuple[Tensor, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the tensors of all these experts."""
        return tuple(source for row in self.rows for source in row.sources)

    def join(self, parts: Iterator[Tensor]) -> Tensor:
        """Return [2 * channels, hidden] as Megatron has it: all rows of gate, then all of up.

        Args:
            parts: the tensors of `sources`; those of one expert are in memory at a time.
        """
        halves = [
            row.transform.join([next(parts) for _ in row.sources]).unflatten(0, (2, -1))[:, kept]
            for row, kept in zip(self.rows, self.kept, strict=True)
        ]
        return torch.cat(halves, dim=1).flatten(0, 1)


def mixtures_of(family: Family, config: HfConfig, args: MegatronArgs, prefix: str) -> dict[int, Mixture]:
    """Find the layers with experts, by their numbers.

    Args:
        family: as the folder stores it.
        args: the model's, as `architecture` returns them.
        prefix: the beginning of the names of a layer's modules in transformers' model, with `{layer}` in it.
    """
    rows = {row.mcore: row for row in family.rows(config)}
    found = {}
    for layer in range(args["num_layers"]):
        mlp = f"decoder.layers.{layer}.mlp."
        if f"{mlp}router.weight" not in rows:
            continue
        experts = [
            rows[f"{mlp}experts.local_experts.{each}.linear_fc1.weight"]
            for each in range(args["num_experts"])
        ]
        shared = rows.get(f"{mlp}shared_experts.linear_fc1.weight")
        widths, second = [args["moe_ffn_hidden_size"]] * len(experts), ""
        if shared is not None:
            experts, widths = [shared, *experts], [args["moe_shared_expert_intermediate_size"], *widths]
            second = rows[f"{mlp}shared_experts.linear_fc2.weight"].sources[0].removesuffix(".weight")
        module = prefix.format(layer=layer).rstrip(".")
        found[layer] = Mixture(layer, module, tuple(experts), tuple(widths), second)
    return found
