"""Warnings, on rank 0, of a learning rate that trains nothing, and of values of its schedule that change nothing.

They are no refusals: a training may be the first part of a longer one, whose schedule it follows.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator

from megatron_fdd.plan.context import Context


def _is_constant(args: argparse.Namespace) -> bool:
    return args.lr_decay_style == "constant"


def _has_warmup(args: argparse.Namespace) -> bool:
    return bool(args.lr_warmup_iters or args.lr_warmup_samples or args.lr_warmup_fraction)


# Each row: flags by their names in `args`, with Megatron's defaults; when they change nothing; and why.
_NO_EFFECT: tuple[tuple[dict[str, object], Callable[[argparse.Namespace], bool], str], ...] = (
    (
        {"lr_wsd_decay_iters": None, "lr_wsd_decay_samples": None, "lr_wsd_decay_style": "exponential"},
        lambda args: args.lr_decay_style != "WSD",
        "only --lr-decay-style WSD has such a part",
    ),
    ({"min_lr": 0.0}, _is_constant, "with --lr-decay-style constant the rate never falls"),
    (
        {"lr_decay_iters": None, "lr_decay_samples": None},
        lambda args: _is_constant(args) and args.lr_warmup_fraction is None,
        "with --lr-decay-style constant the rate never falls",
    ),
    ({"lr_warmup_init": 0.0}, lambda args: not _has_warmup(args), "there is no warm-up (--lr-warmup-iters)"),
    ({"decoupled_min_lr": None}, lambda args: args.decoupled_lr is None, "there is no --decoupled-lr"),
)


def warn_of_rate(context: Context) -> None:
    """Warn of a learning rate of 0, of a warm-up that never ends, and of values of the schedule without effect."""
    args = context.args
    if args.rank != 0 or args.skip_train:
        return
    for message in _messages(args):
        warnings.warn(message, stacklevel=2)


def _messages(args: argparse.Namespace) -> Iterator[str]:
    if args.lr == 0 and not args.decoupled_lr:
        biases = args.moe_router_enable_expert_bias and args.moe_router_bias_update_rate
        moved = f" but expert biases (--moe-router-bias-update-rate {biases:g})" if biases else ""
        yield f"--lr 0: no weight of the student will change{moved}; give a rate above 0 to train it"
        return
    yield from _out_of_reach(args)
    for defaults, applies, why in _NO_EFFECT:
        given = [name for name, default in defaults.items() if getattr(args, name) != default]
        if given and applies(args):
            flags = ", ".join(f"--{name.replace('_', '-')} {getattr(args, name)}" for name in given)
            yield f"{flags}: no effect, {why}; leave it out"


def _out_of_reach(args: argparse.Namespace) -> Iterator[str]:
    """Yield what is wrong with a schedule whose parts do not fit into the training."""
    unit, named = ("iters", "iterations") if args.train_iters is not None else ("samples", "samples")
    total = getattr(args, f"train_{unit}")
    decay, warmup = getattr(args, f"lr_decay_{unit}") or total, getattr(args, f"lr_warmup_{unit}")
    flag = f"--lr-warmup-{unit} {warmup}"
    if args.lr_warmup_fraction is not None:
        warmup = args.lr_warmup_fraction * decay
        flag = f"--lr-warmup-fraction {args.lr_warmup_fraction:g} of --lr-decay-{unit} {decay}"
    if warmup and warmup >= total:
        yield (
            f"{flag}: the training ends after {total} {named}, inside of the warm-up, and the rate never rises to "
            f"--lr {args.lr:g}; lower it, unless a longer training goes on from this one"
        )
    if decay < total and not _is_constant(args) and not args.min_lr:
        yield (
            f"--lr-decay-{unit} {decay}: from there on the rate is --min-lr 0, and in the last {total - decay} of "
            f"{total} {named} no weight changes; raise it, or give --min-lr"
        )
