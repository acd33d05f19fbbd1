"""The parts of a teacher that a student keeps: layers, and within them channels, heads and experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_fdd.convert.families.family import MegatronArgs
from megatron_fdd.convert.parameter_axes import HIDDEN_KEY, Axis, key_of


@dataclass(frozen=True, slots=True)
class KeptParts:
    """What a student keeps of its teacher. All numbers are the teacher's, from 0, and increase.

    Attributes:
        teacher: the teacher's architecture, as Megatron's arguments.
        layers: numbers of layers.
        entries: by `key_of`, int64 numbers of hidden channels, of an MLP's channels, or of experts [kept]; of attention
            heads [query groups, heads in each]. A key that is missing is kept whole.
    """

    teacher: MegatronArgs
    layers: Sequence[int]
    entries: Mapping[str, Tensor] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of_scores(
        cls, teacher: MegatronArgs, student: MegatronArgs, layers: Sequence[int], scores: Mapping[str, Tensor]
    ) -> KeptParts:
        """Choose the parts with the highest scores.

        Heads are chosen within each query group, query groups by the scores of their heads, and experts within each
        group of them. RMS norms of fewer channels are scaled so that they make of those what the teacher's make, on
        average.

        Args:
            scores: as `measure_importance` returns them.
        """
        entries = {}
        for key, score in scores.items():
            if key.endswith(".weight"):
                continue
            if key.endswith(".self_attention"):
                kept, before = _highest_heads(teacher, student, score), teacher["num_attention_heads"]
            elif key.endswith(".router"):
                kept, before = _highest_experts(teacher, student, score), len(score)
            else:
                kept, before = highest(score, student[_size_of(key)]), len(score)
            if kept.numel() < before:
                entries[key] = kept
        scales = {}
        if HIDDEN_KEY in entries and teacher["normalization"] == "RMSNorm":
            shares = {key: share for key, share in scores.items() if key.endswith(".weight")}
            scales = {key: _norm_scale(share, entries[HIDDEN_KEY]) for key, share in shares.items()}
        return cls(teacher, layers, entries, scales)

    def along(self, axis: Axis, parameter: str, size: int) -> Tensor | None:
        """Return which entries of a parameter are kept along an axis of `size` entries; None: all of them.

        Raises:
            ValueError: heads are to be cut where they are not independent of each other.
        """
        if axis is Axis.WHOLE:
            return None
        kept = self.entries.get(key_of(axis, parameter))
        if kept is None:
            return None
        if axis in (Axis.HIDDEN, Axis.FFN, Axis.EXPERTS):
            return kept
        if axis is Axis.GATED_FFN:
            gated = self.teacher["swiglu"] or self.teacher["quick_geglu"]
            return torch.cat([kept, size // 2 + kept]) if gated else kept
        if axis is Axis.EACH_HEAD:
            return kept.flatten()
        if axis is Axis.LATENT_HEADS or (axis is Axis.ONE_HEAD and size != self.teacher["kv_channels"]):
            raise ValueError(
                f"--num-attention-heads: {parameter} is not of one head after the other, in query groups; leave the "
                "heads as they are"
            )
        if axis is Axis.ONE_HEAD:
            return None
        blocks = kept.flatten() if axis is Axis.HEADS else self._qkv_blocks(kept)
        width = self.teacher["kv_channels"]
        return (blocks[:, None] * width + torch.arange(width)).flatten()

    def _qkv_blocks(self, kept: Tensor) -> Tensor:
        """Return which blocks of one head's width are kept of [q ... q k v], [q ... q k v], ..."""
        in_group = self.teacher["num_attention_heads"] // self.teacher["num_query_groups"]
        group = kept[:, :1] // in_group
        first = group * (in_group + 2)
        return torch.cat([first + kept % in_group, first + in_group, first + in_group + 1], dim=1).flatten()

    def source_of(self, parameter: str) -> str:
        """Return the teacher's parameter that becomes a parameter of the student."""
        prefix, layer, rest = _layer_of(parameter)
        if layer is None:
            return parameter
        source = f"{prefix}{self.layers[layer]}.{rest}"
        experts = self.entries.get(f"{prefix}{self.layers[layer]}.mlp.router")
        before, found, expert = source.partition(".local_experts.")
        if experts is None or not found:
            return source
        number, _, end = expert.partition(".")
        return f"{before}{found}{int(experts[int(number)])}.{end}"


def highest(scores: Tensor, count: int) -> Tensor:
    """Return where the highest scores are, in increasing order; of equal ones the first."""
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :count].sort().values


def _size_of(key: str) -> str:
    """Return which of `SIZES` is the number of the channels with this key."""
    if key == HIDDEN_KEY:
        return "hidden_size"
    if ".local_experts." in key:
        return "moe_ffn_hidden_size"
    return "moe_shared_expert_intermediate_size" if key.endswith(".shared_experts") else "ffn_hidden_size"


def _norm_scale(share: Tensor, kept: Tensor) -> float:
    """Return by what a norm over the kept channels is too small: the root of how much their mean square is larger."""
    return float((share[kept].mean() / share.mean()).sqrt())


def _highest_experts(teacher: MegatronArgs, student: MegatronArgs, score: Tensor) -> Tensor:
    """Return experts, as many of each group as of the others."""
    groups = teacher["moe_router_num_groups"] or 1
    in_group = highest(score.view(groups, -1), student["num_experts"] // groups)
    return (torch.arange(groups)[:, None] * (len(score) // groups) + in_group).flatten()


def _highest_heads(teacher: MegatronArgs, student: MegatronArgs, score: Tensor) -> Tensor:
    """Return heads [query groups, heads in each] by the scores of their channels."""
    heads, groups = student["num_attention_heads"], student["num_query_groups"]
    by_head = score.square().view(teacher["num_query_groups"], -1, teacher["kv_channels"]).sum(-1)
    kept_groups = highest(by_head.sum(-1), groups)
    in_group = highest(by_head[kept_groups], heads // groups)
    return kept_groups[:, None] * by_head.shape[1] + in_group


def _layer_of(parameter: str) -> tuple[str, int | None, str]:
    """Divide a name at the number of its layer, which is None outside the layers."""
    prefix = "decoder.layers."
    if not parameter.startswith(prefix):
        return "", None, parameter
    number, _, rest = parameter.removeprefix(prefix).partition(".")
    return prefix, int(number), rest
