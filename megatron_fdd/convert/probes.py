"""The places in a model whose activations tell which of its parts matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from megatron_fdd.convert.families.family import Family, HfConfig, MegatronArgs, WeightRow
from megatron_fdd.convert.parameter_axes import Axis, axes_of, key_of
from megatron_fdd.convert.student_sizes import architecture, flag_of


class Side(Enum):
    """Which activations of a module are looked at."""

    INPUT = "input"
    OUTPUT = "output"
    EXPERTS = "experts"
    """Those of each expert, within the module, which is a whole layer."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A place in transformers' model where parts are scored.

    Attributes:
        key: of `key_of`; the scores of all probes with one key are added.
        module: path of the module.
        num_parts: number of its channels, or experts.
        norm: the norm's weight in Megatron; empty of other modules.
        expert_width: channels of an expert.
    """

    key: str
    module: str
    side: Side
    num_parts: int
    norm: str = ""
    expert_width: int = 0

    def expert_key(self, expert: int) -> str:
        """Return the key of an expert's channels."""
        return f"{self.key.removesuffix('router')}experts.local_experts.{expert}"

    @property
    def keys(self) -> dict[str, int]:
        """The keys of its scores, and how many there are of each."""
        experts = range(self.num_parts if self.side is Side.EXPERTS else 0)
        return {self.key: self.num_parts, **{self.expert_key(each): self.expert_width for each in experts}}


def probes_of(
    family: Family, config: HfConfig, layers: Sequence[int], sizes: Mapping[str, int]
) -> list[Probe]:
    """List the places that tell which parts to keep.

    Hidden channels are scored by the outputs of norms; those of an MLP, and heads, by the inputs of the matrix behind
    them; experts and their channels by what each does on its tokens.

    Args:
        layers: numbers of the layers that are kept.
        sizes: the student's, by the names in `SIZES`.

    Raises:
        ValueError: there is no place that a size cuts.
    """
    kept = tuple(f"decoder.layers.{layer}." for layer in layers)
    args = architecture(family, config)
    found: dict[str, list[Probe]] = {size: [] for size in sizes}
    for row in family.rows(config) if sizes else ():
        is_kept = row.mcore.startswith(kept) or not row.mcore.startswith("decoder.layers.")
        if is_kept and row.mcore.endswith(".weight") and row.sources:
            for size in _sizes_cut_at(row) & sizes.keys():
                found[size].append(_probe(family, args, row))
    for size, value in sizes.items():
        if not found[size]:
            raise ValueError(f"{flag_of(size)} {value}: no layer that is kept has such parts; leave it out")
    return list(dict.fromkeys(probe for probes in found.values() for probe in probes))


def _sizes_cut_at(row: WeightRow) -> set[str]:
    """Return the sizes for which the module of a weight is looked at."""
    axes = axes_of(row.mcore)
    if axes == (Axis.HIDDEN,):
        return {"hidden_size"}
    if axes[-1] is Axis.HEADS:
        return {"num_attention_heads", "num_query_groups"}
    if axes[0] is Axis.EXPERTS:
        return {"num_experts", "moe_ffn_hidden_size"}
    if axes[-1] is not Axis.FFN or ".local_experts." in row.mcore:
        return set()
    return {"moe_shared_expert_intermediate_size" if ".shared_experts." in row.mcore else "ffn_hidden_size"}


def _probe(family: Family, args: MegatronArgs, row: WeightRow) -> Probe:
    *_, axis = axes = axes_of(row.mcore)
    module = row.sources[0].removesuffix(".weight")
    if axes[0] is Axis.EXPERTS:
        layer = row.mcore.removeprefix("decoder.layers.").partition(".")[0]
        module = family.layer_prefix.format(layer=layer).rstrip(".")
        key = key_of(axes[0], row.mcore)
        return Probe(key, module, Side.EXPERTS, args["num_experts"], expert_width=args["moe_ffn_hidden_size"])
    key = key_of(axis, row.mcore)
    if axis is Axis.HIDDEN:
        return Probe(key, module, Side.OUTPUT, args["hidden_size"], norm=row.mcore)
    if axis is Axis.HEADS:
        return Probe(key, module, Side.INPUT, args["num_attention_heads"] * args["kv_channels"])
    (size,) = _sizes_cut_at(row)
    return Probe(key, module, Side.INPUT, args[size])
