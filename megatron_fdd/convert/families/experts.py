"""Mixtures of experts, in config.json and in Megatron's args."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_fdd.convert.families.config_fields import check_experts
from megatron_fdd.convert.families.expert_naming import (
    FIRST_DENSE,
    GROUPS,
    PER_TOKEN,
    SCALING,
    TOP_GROUPS,
    ExpertNaming,
    SharedNaming,
)
from megatron_fdd.convert.families.family import HfConfig, MegatronArgs, refuse_field

# What the routers of these families do not do, by Megatron's arguments.
FIXED_EXPERTS: dict[str, Any] = {
    "moe_apply_probs_on_input": False,
    "moe_latent_size": None,
    "moe_mlp_glu_interleave_size": None,
    "moe_shared_expert_glu_interleave_size": None,
}


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts.

    Attributes:
        count: number of experts in a layer.
        per_token: number of experts that process a token.
        width: the width of one expert.
        normalised: whether the weights of a token's experts sum to 1 before `scaling`.
        sparse: for each layer, whether it has experts.
        chosen_by_sigmoid: whether scores are sigmoids.
        biased: whether a bias is added to sigmoids, for the choice alone.
        groups: number of groups of experts, and how many of them a token may use; None without groups.
        scaling: factor of the weights.
        shared_width: width of the expert for every token; None without one.
        shared_gate: whether a sigmoid scales its output.
    """

    count: int
    per_token: int
    width: int
    normalised: bool
    sparse: tuple[bool, ...]
    chosen_by_sigmoid: bool = False
    biased: bool = False
    groups: tuple[int, int] | None = None
    scaling: float = 1.0
    shared_width: int | None = None
    shared_gate: bool = False

    def megatron_args(self) -> MegatronArgs:
        """Return argparse destinations and values."""
        groups = self.groups or (None, None)
        return {
            "num_experts": self.count,
            "moe_router_topk": self.per_token,
            "moe_ffn_hidden_size": self.width,
            # The softmax over a token's experts alone equals the normalised softmax over all experts.
            "moe_router_pre_softmax": not self.normalised,
            "moe_layer_freq": 1 if all(self.sparse) else [int(sparse) for sparse in self.sparse],
            "moe_router_score_function": "sigmoid" if self.chosen_by_sigmoid else "softmax",
            "moe_router_enable_expert_bias": self.biased,
            "moe_router_num_groups": groups[0],
            "moe_router_group_topk": groups[1],
            "moe_router_topk_scaling_factor": None if self.scaling == 1.0 else self.scaling,
            "moe_shared_expert_intermediate_size": self.shared_width,
            "moe_shared_expert_gate": self.shared_gate,
        }

    @classmethod
    def of_args(cls, args: Namespace) -> Experts:
        """Read the experts from Megatron's args. ValueError if they describe a dense model."""
        if args.num_experts is None:
            raise ValueError("the checkpoint has no experts, and the Hugging Face config has")
        rule = args.moe_layer_freq
        if isinstance(rule, int):
            rule = [layer % rule == 0 for layer in range(args.num_layers)]
        groups = None
        if args.moe_router_num_groups is not None:
            groups = args.moe_router_num_groups, args.moe_router_group_topk
        scaling = args.moe_router_topk_scaling_factor
        return cls(
            count=args.num_experts,
            per_token=args.moe_router_topk,
            width=args.moe_ffn_hidden_size or args.ffn_hidden_size,
            normalised=not args.moe_router_pre_softmax,
            sparse=tuple(bool(one) for one in rule),
            chosen_by_sigmoid=args.moe_router_score_function == "sigmoid",
            biased=bool(args.moe_router_enable_expert_bias),
            groups=groups,
            scaling=1.0 if scaling is None else scaling,
            shared_width=args.moe_shared_expert_intermediate_size,
            shared_gate=bool(getattr(args, "moe_shared_expert_gate", False)),
        )

    def keep_layers(self, layers: Sequence[int]) -> Experts:
        """Return the experts of these layers alone."""
        return replace(self, sparse=tuple(self.sparse[layer] for layer in layers))


def read_experts(naming: ExpertNaming | None, config: Mapping[str, Any], layers: int) -> Experts | None:
    """Read the experts from config.json; None for a model type without experts.

    Raises:
        ValueError: Megatron's router cannot do something; the message names it.
    """
    if naming is None:
        return None
    counts = [config[field] for field in naming.count_fields if config.get(field) is not None]
    if not counts or any(count != counts[0] for count in counts):
        refuse_field(naming.count_fields[0], counts, "one number of experts is needed")
    per_token = config[PER_TOKEN]
    check_experts(layers, (naming.count_fields[0], counts[0]), (PER_TOKEN, per_token))
    normalised = bool(config.get("norm_topk_prob", True)) if naming.normalises else True
    biased = naming.bias is not None and not naming.own_router
    if biased and not normalised:
        refuse_field("norm_topk_prob", False, "and Megatron's sigmoid router always makes weights sum to 1")
    width = config[naming.width_field]
    return Experts(
        count=counts[0],
        per_token=per_token,
        width=width,
        normalised=normalised,
        sparse=_sparse_layers(naming, config, layers),
        chosen_by_sigmoid=biased or naming.is_sigmoid,
        biased=biased,
        groups=_groups(config, counts[0], per_token) if naming.grouped else None,
        scaling=float(config[SCALING]) if naming.grouped else 1.0,
        shared_width=_shared_width(naming.shared, config, width),
        shared_gate=naming.shared is not None and naming.shared.gate is not None,
    )


def _groups(config: Mapping[str, Any], count: int, per_token: int) -> tuple[int, int] | None:
    """Return the groups of experts. Megatron scores a group by the best of its share of a token's experts."""
    groups, top = config[GROUPS], config[TOP_GROUPS]
    if groups in (None, 1):
        return None
    if count % groups:
        refuse_field(GROUPS, groups, f"which must divide the number of experts ({count})")
    if top is None or top > groups:
        refuse_field(TOP_GROUPS, top, f"which must be a number of the {groups} groups ({GROUPS})")
    if per_token // top != 2:
        refuse_field(
            TOP_GROUPS,
            top,
            f"and Megatron scores a group by {per_token} // {top} experts, where this model takes the best 2",
        )
    if top * (count // groups) < per_token:
        refuse_field(
            GROUPS,
            groups,
            f"so that {top} groups have {top * (count // groups)} of the {count} experts, and a token takes "
            f"{per_token}",
        )
    return groups, top


def _shared_width(naming: SharedNaming | None, config: Mapping[str, Any], width: int) -> int | None:
    if naming is None:
        return None
    if naming.width_field is not None:
        shared = config[naming.width_field]
        assert isinstance(shared, int)
        return shared
    assert naming.count_field is not None
    count = config[naming.count_field]
    return width * count if count else None


def _sparse_layers(naming: ExpertNaming, config: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    """Find which layers have experts; without fields that say it, every layer has."""
    if naming.layer_fields == FIRST_DENSE:
        return tuple(layer >= config[FIRST_DENSE[0]] for layer in range(layers))
    step, dense = config.get("decoder_sparse_step") or 1, config.get("mlp_only_layers") or ()
    return tuple((layer + 1) % step == 0 and layer not in dense for layer in range(layers))


def write_experts(naming: ExpertNaming, config: HfConfig, before: Experts, after: Experts) -> None:
    """Set the fields of `config` that describe experts, where they differ."""
    if before.count != after.count:
        for field in [name for name in naming.count_fields if name in config] or naming.count_fields[:1]:
            config[field] = after.count
    if before.per_token != after.per_token:
        config[PER_TOKEN] = after.per_token
    if before.width != after.width:
        config[naming.width_field] = after.width
    if before.normalised != after.normalised and naming.normalises:
        config["norm_topk_prob"] = after.normalised
    if naming.grouped:
        _write_grouped(config, before, after)
    if naming.shared is not None and (before.shared_width, before.width) != (after.shared_width, after.width):
        _write_shared(naming.shared, config, after)
    _write_sparse(naming, config, after.sparse)


def _write_grouped(config: HfConfig, before: Experts, after: Experts) -> None:
    if before.groups != after.groups:
        config[GROUPS], config[TOP_GROUPS] = after.groups or (1, 1)
    if before.scaling != after.scaling:
        config[SCALING] = after.scaling


def _write_shared(naming: SharedNaming, config: HfConfig, after: Experts) -> None:
    width = after.shared_width or 0
    if naming.width_field is not None:
        config[naming.width_field] = width
    else:
        assert naming.count_field is not None
        config[naming.count_field] = width // after.width


def _write_sparse(naming: ExpertNaming, config: HfConfig, sparse: Sequence[bool]) -> None:
    if not naming.layer_fields:
        return
    if naming.layer_fields == FIRST_DENSE:
        config[FIRST_DENSE[0]] = next((layer for layer, one in enumerate(sparse) if one), len(sparse))
    elif _sparse_layers(naming, config, len(sparse)) != tuple(sparse):
        config["decoder_sparse_step"] = 1
        config["mlp_only_layers"] = [layer for layer, one in enumerate(sparse) if not one]
