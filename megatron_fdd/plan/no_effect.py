"""Warnings, on rank 0, of flags that have no effect together with the others of their command line.

A flag counts as given where its value is not the default.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable

from megatron_fdd.config import DEFAULTS, FddConfig
from megatron_fdd.config.flags import dest
from megatron_fdd.losses.terms import (
    active_terms,
    compares_taps,
    first_tap,
    needs_of,
    uses_final_head,
    uses_taps,
)
from megatron_fdd.ops.divergence import DIVERGENCES
from megatron_fdd.plan.context import Context

# Returns why a flag has no effect; None where it has one.
Why = Callable[[FddConfig, argparse.Namespace], str | None]


def _without_teacher(config: FddConfig, _args: argparse.Namespace) -> str | None:
    return None if needs_of(config).teacher else "no term that has a weight needs a teacher"


def _from_store(config: FddConfig, _args: argparse.Namespace) -> str | None:
    return "--fdd-teacher-store takes the teacher's place" if config.teacher_store else None


def _without_stream(config: FddConfig, _args: argparse.Namespace) -> str | None:
    """Return why nothing is waited for."""
    return None if config.teacher_follow else "only a stream is waited for, with --fdd-teacher-follow"


def _without_taps(config: FddConfig, _args: argparse.Namespace) -> str | None:
    return None if uses_taps(config) else "no term of inner layers has a weight"


def _without_fp8(config: FddConfig, _args: argparse.Namespace) -> str | None:
    return None if config.teacher_fp8_format else "the teacher runs in FP8 only with --teacher-fp8-format"


def _with_pairs(config: FddConfig, _args: argparse.Namespace) -> str | None:
    return "--fdd-layer-pairs takes its place" if config.layer_pairs is not None else None


def _unread(name: str) -> Why:
    """Return why a flag has no effect of which nothing but terms knows."""

    def why(config: FddConfig, _args: argparse.Namespace) -> str | None:
        return None if _is_read(config, name) else "no term that has a weight depends on it"

    return why


def _is_read(config: FddConfig, name: str) -> bool:
    return any(name in term.settings for term in active_terms(config))


def _without_divergence(config: FddConfig, _args: argparse.Namespace) -> str | None:
    return None if needs_of(config).divergence else "no term that has a weight uses it"


def _without_mix(config: FddConfig, _args: argparse.Namespace) -> str | None:
    used = [config.kd_divergence] if config.kd_weight > 0 else []
    used += [config.trajectory_divergence] if needs_of(config).divergence else []
    if not used:
        return "no divergence has a weight"
    if any(DIVERGENCES[name].default_mix is not None for name in used):
        return None
    return f"{' and '.join(dict.fromkeys(used))} {'has' if len(set(used)) == 1 else 'have'} no mix"


def _nothing_to_heat(config: FddConfig, _args: argparse.Namespace) -> str | None:
    is_heated = needs_of(config).divergence or _is_read(config, "temperature")
    return None if is_heated else "no divergence has a weight"


def _without_comparison(config: FddConfig, _args: argparse.Namespace) -> str | None:
    return None if compares_taps(config) else "no term that has a weight compares a layer with the one before"


def _labels_alone(config: FddConfig, _args: argparse.Namespace) -> str | None:
    if any(term.tokens == "term" for term in active_terms(config)):
        return None
    return "the cross-entropy with the data is over tokens with a label"


def _one_tap(config: FddConfig, _args: argparse.Namespace) -> str | None:
    is_one = config.num_pairs - first_tap(config) == 1
    return "there is one tap to draw from; raise --fdd-layers" if is_one else None


def _one_stage(_config: FddConfig, args: argparse.Namespace) -> str | None:
    is_one = args.pipeline_model_parallel_size == 1
    return "with one pipeline stage the teacher's features do not wait" if is_one else None


def _nothing_to_skip(config: FddConfig, _args: argparse.Namespace) -> str | None:
    """Return why no vocabulary tile can be skipped."""
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


# A store has its own precision, which is compared with the flags of it (`plan/teacher_store.py`).
_OF_LIVE_TEACHER = ("teacher_expert_model_parallel_size", "offload_teacher_taps")
_OF_TEACHER = (
    *("teacher_load", "teacher_store", "teacher_follow", *_OF_LIVE_TEACHER),
    *("teacher_fp8_format", "teacher_fp8_recipe"),
)
_OF_TAPS = (
    *("teacher_lens", "layers", "layer_rule", "layer_pairs", "lens_norm", "lens_head", "warmup_iters"),
    *("decay_iters", "skip_below", "sample_tokens", "sample_one_tap", "tap_dtype"),
)
# Each row: fields of `FddConfig`, and why their flags have no effect. The first row that applies names a flag.
NO_EFFECT: tuple[tuple[tuple[str, ...], Why], ...] = (
    (_OF_TEACHER, _without_teacher),
    (_OF_LIVE_TEACHER, _from_store),
    (("teacher_wait",), _without_stream),
    (_OF_TAPS, _without_taps),
    (("teacher_fp8_recipe",), _without_fp8),
    (("layers", "layer_rule"), _with_pairs),
    (("kd_divergence",), _unread("kd_divergence")),
    (("trajectory_divergence",), _without_divergence),
    (("divergence_mix",), _without_mix),
    (("temperature",), _nothing_to_heat),
    (("delta",), _unread("delta")),
    (("delta_detach_previous",), _without_comparison),
    (("tokens",), _labels_alone),
    (("sample_one_tap",), _one_tap),
    (("offload_teacher_taps",), _one_stage),
    (("skip_below",), _nothing_to_skip),
)


def warn_of_flags(context: Context) -> None:
    """Warn of flags about the distillation that change nothing: one line for each row of `NO_EFFECT` that applies."""
    if context.args.rank != 0:
        return
    config, named = context.config, set[str]()
    for names, why in NO_EFFECT:
        given = [name for name in names if getattr(config, name) != DEFAULTS[name] and name not in named]
        cause = why(config, context.args) if given else None
        if cause is not None:
            named.update(given)
            _warn(f"{', '.join(_as_given(config, name) for name in given)}: no effect, {cause}")


def warn_of_schedule(context: Context) -> None:
    """Warn of weights of inner layers' terms that never rise as high as asked, or end before the training does."""
    config, args = context.config, context.args
    num_steps = _num_steps(args)
    if args.rank != 0 or args.skip_train or num_steps is None or not uses_taps(config):
        return
    if config.warmup_iters > num_steps:
        _warn(
            f"--fdd-warmup-iters {config.warmup_iters}: the training ends after {num_steps} steps, so that the weights "
            f"of inner layers' terms never rise above {num_steps / config.warmup_iters:.0%}; lower it"
        )
    if 0 < config.decay_iters < num_steps and not uses_final_head(config):
        _warn(
            f"--fdd-decay-iters {config.decay_iters}: after that step of {num_steps} no term has a weight, and the "
            "student only decays (--weight-decay); raise it, lower --train-iters, or give --fdd-kd-weight"
        )


def _num_steps(args: argparse.Namespace) -> int | None:
    """Return the number of the training's steps; None while the batch size rises."""
    if args.train_iters is not None:
        return args.train_iters
    if args.train_samples is None or args.step_batch_size_schedule is not None:
        return None
    return args.train_samples // args.global_batch_size


def _as_given(config: FddConfig, name: str) -> str:
    """Return a flag with its value, if that is one word."""
    value = getattr(config, name)
    option = f"--{dest(name).replace('_', '-')}"
    return option if isinstance(value, (bool, tuple)) else f"{option} {value}"


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)
