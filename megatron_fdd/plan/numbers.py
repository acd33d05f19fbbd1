"""Checks of Megatron's numbers and schedules: the flags that a run needs, and the values that training can use."""

from __future__ import annotations

import math

from megatron_fdd.plan.context import Context


def check_given(context: Context) -> None:
    """Refuse a run without the flags that every run needs and that have no default.

    Raises:
        ValueError: names every flag that is missing.
    """
    args = context.args
    missing = {
        "--seq-length N (a checkpoint's own is the longest that its model takes)": args.seq_length is None,
        "--micro-batch-size N": args.micro_batch_size is None,
        "--lr X": args.lr is None and not args.skip_train,
        "--train-iters N or --train-samples N": (
            args.train_iters is None and args.train_samples is None and not args.skip_train
        ),
        "--eval-interval N (even at --eval-iters 0; Megatron has no default for it)": (
            args.eval_interval is None and not args.skip_train
        ),
    }
    flags = [flag for flag, is_missing in missing.items() if is_missing]
    if flags:
        raise ValueError(f"not given: {'; '.join(flags)}")


# The smallest values of numbers that Megatron divides by, counts with or takes a root of, by their names in `args`.
_SMALLEST = {
    **dict.fromkeys(("micro_batch_size", "global_batch_size", "seq_length", "train_samples"), 1),
    **dict.fromkeys(
        ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"), 1
    ),
    **dict.fromkeys(("expert_model_parallel_size", "expert_tensor_parallel_size"), 1),
    **dict.fromkeys(("log_interval", "eval_interval", "tensorboard_log_interval"), 1),
    **dict.fromkeys(("save_interval", "save_retain_interval", "exit_interval"), 1),
    **dict.fromkeys(("lr_decay_iters", "lr_decay_samples", "distributed_timeout_minutes"), 1),
    **dict.fromkeys(("eval_iters", "num_workers", "seed"), 0),
    **dict.fromkeys(("lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction", "lr_warmup_init"), 0),
    **dict.fromkeys(("lr", "min_lr", "weight_decay", "clip_grad", "adam_beta1", "adam_beta2", "adam_eps"), 0),
    **dict.fromkeys(("hidden_dropout", "attention_dropout"), 0),
}
_PARTS = ("hidden_dropout", "attention_dropout", "adam_beta1", "adam_beta2", "lr_warmup_fraction")  # below 1


def check_numbers(context: Context) -> None:
    """Refuse numbers among Megatron's flags with which no training works.

    Raises:
        ValueError: names the flags whose value is not finite, too small or too large.
    """
    args = context.args
    smallest = {**_SMALLEST, "train_iters": 0 if args.skip_train else 1}
    wrong = []
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')} {value}"
        if isinstance(value, float) and not math.isfinite(value):
            wrong.append(f"{flag}: must be a finite number")
        elif isinstance(value, (int, float)) and value < smallest.get(name, -math.inf):
            wrong.append(f"{flag}: must be at least {smallest[name]}")
        elif isinstance(value, (int, float)) and name in _PARTS and value >= 1:
            wrong.append(f"{flag}: must be below 1")
    if wrong:
        raise ValueError("; ".join(wrong))


def check_schedule(context: Context) -> None:
    """Refuse values in the wrong order, such as a --min-lr above --lr; Megatron only asserts this, and late.

    Raises:
        ValueError: names both flags.
    """
    args = context.args
    for low, high, is_below in (
        ("min_lr", "lr", False),
        ("lr_warmup_init", "lr", False),
        ("start_weight_decay", "end_weight_decay", False),
        ("lr_warmup_iters", "lr_decay_iters" if args.lr_decay_iters else "train_iters", True),
        ("lr_warmup_samples", "lr_decay_samples" if args.lr_decay_samples else "train_samples", True),
    ):
        start, end = getattr(args, low), getattr(args, high)
        if args.skip_train or None in (start, end) or start < end or (start == end and not is_below):
            continue
        flags = [f"--{name.replace('_', '-')} {value}" for name, value in ((low, start), (high, end))]
        raise ValueError(f"{flags[0]}: must be {'below' if is_below else 'at most'} {flags[1]}")
