"""A narrower student by plain indexing of transformers' own model, which knows nothing of the package's tables."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# transformers' parameters, and what the entries along each dim are. A bias has the first.
_DIMS = {
    r"embed_tokens|lm_head|wte|wpe": ("all", "hidden"),
    r"_a_layernorm": ("all",),
    r"_a_proj": ("all", "hidden"),
    r"_b_proj": ("all", "all"),
    r"qkv_proj|c_attn": ("qkv", "hidden"),
    r"q_proj": ("heads", "hidden"),
    r"[kv]_proj": ("groups", "hidden"),
    r"o_proj|attn\.c_proj": ("hidden", "heads"),
    r"sinks": ("each head",),
    r"[qk]_norm|(query|key)_layernorm": ("all",),
    r"norm|ln_[12f]": ("hidden",),
    r"gate_up_proj": ("gate and up", "hidden"),
    r"gate_proj|up_proj|c_fc": ("ffn", "hidden"),
    r"down_proj|mlp\.c_proj": ("hidden", "ffn"),
}


def state_of(folder: Path) -> dict[str, Tensor]:
    """Return the weights of transformers' model in float32; those of GPT-2 are transposed."""
    from transformers import AutoModelForCausalLM

    state = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    return {
        name: value.T if ".c_" in name and "transformer." in name and value.ndim == 2 else value
        for name, value in state.items()
    }


def highest(scores: Tensor, count: int) -> list[int]:
    """Return where the highest scores are, in increasing order."""
    return sorted(scores.topk(count).indices.tolist())


@dataclass(frozen=True)
class Narrowing:
    """What a student keeps, by scores.

    Attributes:
        scores: by the package's keys.
        heads, groups, width: of the teacher's attention.
        kept: the student's sizes, by the package's names.
    """

    scores: Mapping[str, Tensor]
    heads: int
    groups: int
    width: int
    kept: Mapping[str, int]

    def _of_heads(self, layer: int) -> dict[str, list[int]]:
        """Return the entries that are kept of all that belongs to a layer's heads."""
        scores = self.scores.get(f"decoder.layers.{layer}.self_attention")
        if scores is None:
            return {}
        members = torch.arange(self.heads).view(self.groups, -1)
        by_head = scores.view(self.heads, self.width).norm(dim=1)
        as_heads = self.kept["num_attention_heads"] if self.groups == self.heads else self.groups
        num_groups = self.kept.get("num_query_groups", as_heads)
        in_group = self.kept["num_attention_heads"] // num_groups
        groups = highest(by_head[members].norm(dim=1), num_groups)
        heads = [
            int(members[group][place])
            for group in groups
            for place in highest(by_head[members[group]], in_group)
        ]
        channels = [head * self.width + channel for head in heads for channel in range(self.width)]
        keys = [group * self.width + channel for group in groups for channel in range(self.width)]
        first_key, first_value = self.heads * self.width, (self.heads + self.groups) * self.width
        qkv = [*channels, *(first_key + key for key in keys), *(first_value + key for key in keys)]
        return {"heads": channels, "groups": keys, "qkv": qkv, "each head": heads}

    def cut(self, name: str, value: Tensor) -> Tensor:
        """Return what is kept of one of transformers' parameters."""
        found = re.search(r"\.(?:layers|h)\.(\d+)\.", name)
        layer = int(found[1]) if found else -1
        entries = self._of_heads(layer)
        if "hidden" in self.scores:
            entries["hidden"] = highest(self.scores["hidden"], self.kept["hidden_size"])
        ffn = self.scores.get(f"decoder.layers.{layer}.mlp")
        if ffn is not None:
            entries["ffn"] = highest(ffn, self.kept["ffn_hidden_size"])
            entries["gate and up"] = [*entries["ffn"], *(len(ffn) + channel for channel in entries["ffn"])]
        dims = next(dims for pattern, dims in _DIMS.items() if re.search(pattern, name))
        for dim, what in enumerate(dims[: value.ndim]):
            if what in entries:
                value = value[entries[what]] if dim == 0 else value[:, entries[what]]
        return value
