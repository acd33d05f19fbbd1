"""The names of weights in checkpoints: those that one weight can have, and the entries that are no weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor

from megatron_fdd.host.checkpoint import EXTRA_STATE, TERM_PREFIX

# Entries of a training checkpoint that are not weights.
_NOT_WEIGHTS = ("optimizer", "chained_", "rng_state", "rerun_state_machine", "opt_param_scheduler")
# The norm before a mixture of experts, as Megatron's local and TransformerEngine's modules name it.
_EXPERT_NORM = ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")


def other_name(key: str) -> str:
    """Return the second name that a weight can have in a checkpoint; most weights have none and keep their own.

    Megatron's local modules and TransformerEngine's give the norm before a mixture of experts different names, and
    each looks only for its own name. A conversion writes both.
    """
    for name, other in (_EXPERT_NORM, _EXPERT_NORM[::-1]):
        if name in key:
            return key.replace(name, other)
    return key


def use_stored_names(sharded: Mapping[str, ShardedBase], stored: Collection[str]) -> None:
    """Make the entries of a model ask for the names under which the checkpoint stores its weights."""
    for entry in sharded.values():
        if isinstance(entry, ShardedTensor) and entry.key not in stored and other_name(entry.key) in stored:
            entry.key = other_name(entry.key)


def weights_only(keys: Iterable[str]) -> list[str]:
    """Leave out optimizer and other training state, empty extra state, and what is never built for use.

    That is multi-token prediction, and what the terms of a distillation have learned.
    """
    left_out = (*_NOT_WEIGHTS, "mtp.", TERM_PREFIX)
    return sorted(key for key in keys if not key.startswith(left_out) and not key.endswith(EXTRA_STATE))
