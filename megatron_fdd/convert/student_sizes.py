"""The sizes of a student that is narrower than its teacher."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping

from megatron_fdd.convert.families.family import Family, HfConfig, MegatronArgs

# Sizes that can be made smaller, by Megatron's arguments, and what each is of.
SIZES: dict[str, str] = {
    "hidden_size": "hidden channels",
    "ffn_hidden_size": "channels of an MLP",
    "num_attention_heads": "attention heads",
    "num_query_groups": "query groups",
    "num_experts": "experts in a layer",
    "moe_ffn_hidden_size": "channels of an expert",
    "moe_shared_expert_intermediate_size": "channels of the shared expert",
}


def flag_of(size: str) -> str:
    """Return the flag of one of `SIZES`, which is Megatron's."""
    return "--" + size.replace("_", "-")


def architecture(family: Family, config: HfConfig) -> MegatronArgs:
    """Return a model's Megatron arguments; without grouped queries each head is a group."""
    args = {"group_query_attention": False, **family.fixed, **family.megatron_args(config)}
    if not args["group_query_attention"]:
        args["num_query_groups"] = args["num_attention_heads"]
    return args


def narrower_config(family: Family, config: HfConfig, sizes: Mapping[str, int]) -> HfConfig:
    """Return the config of a model with smaller sizes.

    Args:
        sizes: by the names in `SIZES`; without `num_query_groups` their number stays, or stays that of the heads.

    Raises:
        ValueError: a size does not fit the model, or its config cannot say it.
    """
    if not sizes:
        return config
    before = architecture(family, config)
    for size, value in sizes.items():
        _check_size(family, before, size, value)
    after = {**before, **sizes}
    if "num_query_groups" not in sizes and before["num_query_groups"] == before["num_attention_heads"]:
        after["num_query_groups"] = after["num_attention_heads"]
    if before.get("moe_ffn_hidden_size") == before["ffn_hidden_size"] and "moe_ffn_hidden_size" in sizes:
        after["ffn_hidden_size"] = after[
            "moe_ffn_hidden_size"
        ]  # one field says both where all layers have experts
    after["group_query_attention"] = after["num_query_groups"] != after["num_attention_heads"]
    _check_heads(before, after)
    _check_shared(before, after)
    _check_groups(after)
    try:
        narrower = family.hf_config(config, Namespace(**after))
        found = architecture(family, narrower)
    except ValueError as error:
        why = str(error).partition(";")[0]  # what follows is the remedy of an export
        raise ValueError(
            f"a {family.model_type} has no config of these sizes ({why}); choose others: a shared expert may have to "
            "be a multiple of the experts' width"
        ) from error
    for size in SIZES:
        if found.get(size) != after.get(size):
            raise ValueError(
                f"{flag_of(size)} {after[size]}: the config of a {family.model_type} cannot say it; leave it at "
                f"{before[size]}"
            )
    return narrower


def _check_size(family: Family, before: MegatronArgs, size: str, value: int) -> None:
    """Refuse a size that is above the teacher's, or that its family does not let go."""
    least = before["moe_router_topk"] if size == "num_experts" else 1
    if not least <= value <= before[size]:
        raise ValueError(
            f"{flag_of(size)} {value} must lie between {least} and the teacher's {before[size]} {SIZES[size]}"
        )
    if size in family.uncut:
        raise ValueError(f"{flag_of(size)} {value}: {family.model_type} {family.uncut[size]}; leave it out")


def _check_heads(before: MegatronArgs, after: MegatronArgs) -> None:
    """Refuse numbers of heads that do not divide what they must."""
    heads, groups, hidden = (
        after[name] for name in ("num_attention_heads", "num_query_groups", "hidden_size")
    )
    each = before["num_attention_heads"] // before["num_query_groups"]
    is_given = heads != before["num_attention_heads"]
    if groups != before["num_query_groups"] and not is_given and (heads // groups > each or heads % groups):
        raise ValueError(
            f"--num-query-groups {groups}: a group has {each} heads; add --num-attention-heads {each * groups}, or a "
            "smaller multiple of the groups"
        )
    if heads % groups:
        raise ValueError(
            f"--num-attention-heads {heads} must be a multiple of the {groups} query groups; give another, or fewer "
            "groups with --num-query-groups"
        )
    if heads // groups > each:
        raise ValueError(
            f"--num-attention-heads {heads} in {groups} query groups: the teacher has {each} heads in each; give fewer "
            "heads"
        )
    if hidden % heads and before["hidden_size"] % before["num_attention_heads"] == 0:
        raise ValueError(
            f"--hidden-size {hidden} must be a multiple of the {heads} attention heads, or transformers refuses the "
            f"model; take {max(hidden - hidden % heads, heads)}"
        )


def _check_shared(before: MegatronArgs, after: MegatronArgs) -> None:
    """Refuse a shared expert that is no number of the others, where the teacher's is one and no gate is on it."""
    name = "moe_shared_expert_intermediate_size"
    width, shared = after.get("moe_ffn_hidden_size"), after.get(name)
    if before.get("moe_shared_expert_gate") or not (width and shared):
        return
    if shared % width and before[name] % before["moe_ffn_hidden_size"] == 0:
        raise ValueError(
            f"{flag_of(name)} {shared} must be a multiple of the experts' width, {width}; give another of these two"
        )


def _check_groups(after: MegatronArgs) -> None:
    """Refuse a number of experts that the router's groups do not share evenly."""
    count, groups = after.get("num_experts"), after.get("moe_router_num_groups") or 1
    if count and count % groups:
        raise ValueError(
            f"--num-experts {count} must be a multiple of the {groups} groups among which the router chooses; take "
            f"{count - count % groups + groups}"
        )
