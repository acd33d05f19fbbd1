"""A resumed optimizer at other learning rates than it was saved with.

Megatron 0.19.2 finds a group of parameters in a checkpoint by the group's `max_lr` and `min_lr`, among others, and then
takes both rates from there. So another --lr finds no group, and if it did, it would have no effect.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from megatron.core.optimizer.optimizer import param_group_identifier_keys

from megatron_fdd.host.patches.table import current, replaced

_LOAD = "megatron.training.training.load_checkpoint"
_RATES = ("max_lr", "min_lr")
# `default_config` tells the groups of --decoupled-lr from the others.
_KIND = (*(name for name in param_group_identifier_keys if name not in _RATES), "default_config")
# In Megatron's messages: another group, or another number of them.
_OTHER_GROUPS = ("Could not find parameter group", "('optimizer', 'param_groups')")

Group = Mapping[str, Any]


@contextmanager
def resumed_rates(saved: Sequence[Group], args: argparse.Namespace) -> Iterator[None]:
    """Make Megatron resume an optimizer at the rates that the flags ask for, in a `with` block.

    With --override-opt_param-scheduler these are this run's, with --use-checkpoint-opt_param-scheduler the saved ones.

    Args:
        saved: the groups of the optimizer in the checkpoint; none if it is not loaded.
    """
    load_checkpoint = current(_LOAD)

    def load(ddp_model: Any, optimizer: Any, opt_param_scheduler: Any, *rest: Any, **keywords: Any) -> Any:
        if optimizer is None or not saved:
            return load_checkpoint(ddp_model, optimizer, opt_param_scheduler, *rest, **keywords)
        own = [{name: group.get(name) for name in _RATES} for group in optimizer.param_groups]
        if args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler:
            give_saved_rates(optimizer.param_groups, saved)
        with _told_groups(args.load):
            loaded = load_checkpoint(ddp_model, optimizer, opt_param_scheduler, *rest, **keywords)
        if args.override_opt_param_scheduler:
            for group, rates in zip(optimizer.param_groups, own, strict=True):
                group.update(rates)
        # Megatron has set the next step's rates before these, and its weight decay before it took the saved one.
        opt_param_scheduler.step(0)
        return loaded

    with replaced({_LOAD: load}):
        yield


def give_saved_rates(groups: Sequence[dict[str, Any]], saved: Sequence[Group]) -> None:
    """Give each group the rates under which its counterpart was saved; none where that is not certain."""
    rates: dict[Hashable, set[tuple[Any, ...]]] = defaultdict(set)
    for each in saved:
        rates[_kind(each)].add(tuple(each.get(name) for name in _RATES))
    for group in groups:
        found = rates.get(_kind(group), set())
        if len(found) == 1:
            group.update(zip(_RATES, next(iter(found)), strict=True))


def _kind(group: Group) -> Hashable:
    return tuple(group.get(name) for name in _KIND)


@contextmanager
def _told_groups(folder: str) -> Iterator[None]:
    """Explain Megatron's error when a group of parameters has no counterpart in the checkpoint.

    Raises:
        ValueError: that happened; the same on every rank, because all ranks have the same groups.
    """
    try:
        yield
    except (KeyError, ValueError) as error:
        # The distributed optimizer's error is the key itself.
        is_key = isinstance(error, KeyError) and isinstance(error.args[0], tuple)
        if not is_key and not any(words in str(error) for words in _OTHER_GROUPS):
            raise
        raise ValueError(
            f"--load {folder}: its optimizer has other groups of parameters, or other rates for them, than this run: "
            "give --decoupled-lr, --decoupled-min-lr and the flags of weight decay as in the run that saved it; "
            "--override-opt_param-scheduler takes other rates; --no-load-optim begins with a new optimizer"
        ) from error
