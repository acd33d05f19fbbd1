"""A run that goes on with a checkpoint's optimizer: the schedules and settings with which that was saved."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from megatron.training.training import get_optimizer_param_scheduler

from megatron_fdd.host.checkpoint import read_common_state
from megatron_fdd.plan.context import Context, StoredModel
from megatron_fdd.plan.megatron_errors import megatrons_errors

_SCHEDULER = "opt_param_scheduler"
# The values of Megatron's scheduler that a checkpoint holds, by the flags that decide them.
_DECIDED_BY = {
    "max_lr": "--lr",
    "min_lr": "--min-lr",
    "lr_warmup_steps": "the warm-up in samples (--lr-warmup-iters, --lr-warmup-fraction)",
    "lr_decay_steps": "the decay in samples (--lr-decay-iters or --train-iters)",
    "lr_decay_style": "--lr-decay-style",
    "start_wd": "the first weight decay (--weight-decay, --start-weight-decay)",
    "end_wd": "the last weight decay (--weight-decay, --end-weight-decay)",
    "wd_incr_steps": "the samples over which weight decay grows (--train-iters)",
    "wd_incr_style": "--weight-decay-incr-style",
}

# What decides which parts an optimizer's state has, by the names in `args`.
_OPTIMIZER_KINDS = {"optimizer": "--optimizer", "use_distributed_optimizer": "--use-distributed-optimizer"}


def check_resumption(context: Context) -> None:
    """Refuse schedules that Megatron cannot make, or others than the checkpoint's, unless a flag says which ones count.

    Warn, on rank 0, of settings of Adam that the checkpoint overrules, and of an optimizer that no run can load again.

    Raises:
        ValueError: names every value that differs, or says that the checkpoint has no optimizer.
    """
    args, stored = context.args, context.stored_student
    if args.skip_train:
        return
    if args.rank == 0 and args.optimizer == "sgd" and args.save is not None:
        warnings.warn(
            "--optimizer sgd: Megatron cannot load its state again, so this run goes on from a checkpoint with "
            "--no-load-optim only",
            stacklevel=2,
        )
    own = _schedules(args)
    if stored is None or not context.resumes_optimizer:
        return
    state = read_common_state(stored.path, stored.flag)
    if "optimizer" not in state or _SCHEDULER not in state:
        raise ValueError(
            f"{stored.flag} {stored.folder}: was saved without its optimizer; to begin with a new one at its "
            "iteration, give --no-load-optim"
        )
    _check_same_optimizer(args, stored)
    if not (args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler):
        _check_same_schedules(own, state[_SCHEDULER], stored.folder)
    if args.rank == 0:
        for message in _overruled_settings(args, state):
            warnings.warn(message, stacklevel=2)


def saved_groups(context: Context) -> tuple[Mapping[str, Any], ...]:
    """Return the groups of parameters of the optimizer with which the run goes on; none if it makes a new one."""
    stored = context.stored_student
    if stored is None or not context.resumes_optimizer:
        return ()
    return tuple(_groups(read_common_state(stored.path, stored.flag).get("optimizer")))


def _groups(state: Any) -> Iterator[Mapping[str, Any]]:
    """Yield every group of parameters in an optimizer's state; experts have an optimizer of their own in it."""
    if isinstance(state, Mapping):
        yield from state.get("param_groups", ())
        for each in state.values():
            yield from _groups(each)


def _check_same_optimizer(args: argparse.Namespace, stored: StoredModel) -> None:
    """Refuse an optimizer that Megatron cannot load, or of another kind than the checkpoint's.

    A checkpoint of another program may not tell its kind.
    """
    if args.optimizer == "sgd":
        raise ValueError(
            f"{stored.flag} {stored.folder}: Megatron saves the state of --optimizer sgd and cannot load it; give "
            "--no-load-optim, which begins with a new optimizer at its iteration"
        )
    kinds = dict(_OPTIMIZER_KINDS)
    if not args.use_distributed_optimizer:  # which keeps weights in float32 whatever theirs is
        kinds["bf16"] = "--bf16"
    differences = [
        f"{flag} is {getattr(args, name)} here and {getattr(stored.args, name)} there"
        for name, flag in kinds.items()
        if getattr(stored.args, name, getattr(args, name)) != getattr(args, name)
    ]
    was_decoupled = getattr(stored.args, "decoupled_lr", args.decoupled_lr) is not None
    if was_decoupled != (args.decoupled_lr is not None):
        differences.append(f"--decoupled-lr is given {'there' if was_decoupled else 'here'} only")
    if differences:
        raise ValueError(
            f"{stored.flag} {stored.folder}: its optimizer is of another kind than this run's: "
            f"{'; '.join(differences)}. Give these flags as the run that saved it, or --no-load-optim, which begins "
            "with a new optimizer at its iteration"
        )


def _check_same_schedules(own: Mapping[str, Any], saved: Mapping[str, Any], folder: str) -> None:
    """Refuse a difference between this run's schedules and the saved ones, which Megatron would only assert."""
    differences = [
        f"{flags} is {own[name]} here and {saved[name]} there"
        for name, flags in _DECIDED_BY.items()
        if name in saved and saved[name] != own[name]
    ]
    if differences:
        raise ValueError(
            f"--load {folder}: its schedules of learning rate and weight decay are not this run's: "
            f"{'; '.join(differences)}. Give the flags of the run that saved it, or --override-opt_param-scheduler to "
            "follow this run's, or --use-checkpoint-opt_param-scheduler to follow the saved ones"
        )


def _schedules(args: argparse.Namespace) -> dict[str, Any]:
    """Return the state of the scheduler that Megatron will make of this run's arguments, its globals.

    Raises:
        ValueError: Megatron cannot make one.
    """
    before = dict(vars(args))
    try:
        with megatrons_errors("the schedules of these flags"):
            state: dict[str, Any] = get_optimizer_param_scheduler(
                SimpleNamespace(param_groups=[])
            ).state_dict()
    finally:  # it completes some of them, and would understand these differently a second time
        vars(args).clear()
        vars(args).update(before)
    return state


def _overruled_settings(args: argparse.Namespace, state: Mapping[str, Any]) -> Iterator[str]:
    """Yield a message for each setting of Adam in which the checkpoint's value counts, not this run's."""
    group: Mapping[str, Any] = next(_groups(state["optimizer"]), {})
    betas = group.get("betas", (args.adam_beta1, args.adam_beta2))
    for name, kept in (("adam_beta1", betas[0]), ("adam_beta2", betas[1]), ("adam_eps", group.get("eps"))):
        asked = getattr(args, name)
        if kept is not None and asked != kept:
            yield (
                f"--{name.replace('_', '-')} {asked}: no effect, the optimizer of the checkpoint keeps its {kept}; "
                "--no-load-optim begins with a new optimizer"
            )
