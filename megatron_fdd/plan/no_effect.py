"""Warnings, on rank 0, of flags that have no effect together with the others of their command line."""

from __future__ import annotations

import warnings

from megatron_fdd.config import DEFAULTS, FddConfig
from megatron_fdd.losses.terms import first_tap, needs_of, uses_taps
from megatron_fdd.ops.divergence import DIVERGENCES
from megatron_fdd.plan.context import Context


def warn_of_rate(context: Context) -> None:
    """Warn of a learning rate of 0."""
    args = context.args
    if args.rank == 0 and args.lr == 0 and not args.decoupled_lr and not args.skip_train:
        _warn("--lr 0: no weight of the student will change; give a rate above 0 to train it")


def warn_of_approximations(context: Context) -> None:
    """Warn of a flag about the teacher or the terms of inner layers that changes nothing."""
    config = context.config
    if context.args.rank != 0:
        return
    if config.teacher_fp8_recipe != DEFAULTS["teacher_fp8_recipe"] and config.teacher_fp8_format is None:
        _warn(
            f"--teacher-fp8-recipe {config.teacher_fp8_recipe}: no effect, the teacher runs in FP8 only with "
            "--teacher-fp8-format"
        )
    flags = ["--teacher-lens"] if config.teacher_lens is not None else []
    flags += ["--fdd-sample-tokens"] if config.sample_tokens < 1 else []
    flags += ["--fdd-sample-one-tap"] if config.sample_one_tap else []
    if flags and not uses_taps(config):
        _warn(f"{', '.join(flags)}: no effect, no term of inner layers has a weight")
    elif config.sample_one_tap and config.num_pairs - first_tap(config) == 1:
        _warn("--fdd-sample-one-tap: no effect, there is one tap to draw from; raise --fdd-layers")
    reason = _nothing_to_skip(config)
    if config.skip_below > 0 and reason is not None:
        _warn(f"--fdd-skip-below {config.skip_below}: no effect, {reason}")


def _nothing_to_skip(config: FddConfig) -> str | None:
    """Return why no vocabulary tile can be skipped; None if one can."""
    if config.kernels == "reference":
        return "--fdd-kernels reference has no tiles"
    if config.lens_head == "live":
        return "--fdd-lens-head live needs all of them"
    needs = needs_of(config)
    if not needs.lse:
        return "without the log-probability delta a layer's gradient is one product over the whole vocabulary"
    if needs.divergence and DIVERGENCES[config.trajectory_divergence].num_sweeps > 1:
        others = " and ".join(name for name, kind in DIVERGENCES.items() if kind.num_sweeps == 1)
        return (
            f"--fdd-trajectory-divergence {config.trajectory_divergence} needs all of them; {others} do not"
        )
    return None


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)
