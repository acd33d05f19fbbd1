"""Flags without an effect: each is named once, on rank 0."""

from __future__ import annotations

import dataclasses
import warnings
from argparse import Namespace
from typing import Any

import pytest
from torch import Tensor

from megatron_fdd.config import FddConfig
from megatron_fdd.losses import terms
from megatron_fdd.losses.tap import TapWindow
from megatron_fdd.losses.term import TapContext, TapTerm
from megatron_fdd.plan.context import Context
from megatron_fdd.plan.no_effect import NO_EFFECT, warn_of_flags, warn_of_schedule

WITHOUT_TAPS = {"alpha": 0.0, "beta": 0.0}
WITHOUT_TEACHER = {**WITHOUT_TAPS, "kd_weight": 0.0, "ce_weight": 1.0}
# Fields whose flags always have an effect, or none that could be told before training.
ALWAYS = {
    *("alpha", "beta", "kd_weight", "ce_weight", "term", "kernels"),
    *("metrics_file", "dry_run", "verbose", "plugin", "trust_checkpoint", "skip_checksums"),
    "text_units",  # data/checks.py warns of it
}


def context(options: dict[str, Any], **changes: object) -> Context:
    values = {"rank": 0, "pipeline_model_parallel_size": 1, "skip_train": False, "train_iters": 100}
    return Context(FddConfig(**{"teacher_load": "T"} | options), Namespace(**values | changes))


def said(options: dict[str, Any], **changes: object) -> list[str]:
    """Return the warnings about the flags of a run."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warn_of_flags(context(options, **changes))
    return [str(each.message) for each in found]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            {"teacher_fp8_recipe": "blockwise"},
            "--teacher-fp8-recipe blockwise: no effect, the teacher runs in FP8 only with --teacher-fp8-format",
        ),
        (
            {**WITHOUT_TEACHER, "teacher_fp8_format": "e4m3", "teacher_fp8_recipe": "mxfp8"},
            "--teacher-load T, --teacher-fp8-format e4m3, --teacher-fp8-recipe mxfp8: no effect, no term that has a "
            "weight needs a teacher",
        ),
        (
            {**WITHOUT_TAPS, "layer_pairs": ((1, 2), (2, 4)), "lens_head": "live", "sample_one_tap": True},
            "--fdd-layer-pairs, --fdd-lens-head live, --fdd-sample-one-tap: no effect, no term of inner layers has a "
            "weight",
        ),
        (
            {**WITHOUT_TAPS, "teacher_lens": "L", "warmup_iters": 3, "decay_iters": 9, "skip_below": 1e-3},
            "--teacher-lens L, --fdd-warmup-iters 3, --fdd-decay-iters 9, --fdd-skip-below 0.001: no effect, no term "
            "of inner layers has a weight",
        ),
        (
            {"layer_pairs": ((1, 2), (2, 4)), "layers": 3, "layer_rule": "linspace"},
            "--fdd-layers 3, --fdd-layer-rule linspace: no effect, --fdd-layer-pairs takes its place",
        ),
        (
            {"kd_weight": 0.0, "kd_divergence": "jsd"},
            "--fdd-kd-divergence jsd: no effect, no term that has a weight depends on it",
        ),
        (
            {"alpha": 0.0, "trajectory_divergence": "jsd"},
            "--fdd-trajectory-divergence jsd: no effect, no term that has a weight uses it",
        ),
        ({"divergence_mix": 0.3}, "--fdd-divergence-mix 0.3: no effect, fkl has no mix"),
        (
            {"divergence_mix": 0.3, "kd_divergence": "rkl"},
            "--fdd-divergence-mix 0.3: no effect, rkl and fkl have no mix",
        ),
        (
            {"divergence_mix": 0.3, "kd_divergence": "rkl", "trajectory_divergence": "jsd", "alpha": 0.0},
            "--fdd-divergence-mix 0.3: no effect, rkl has no mix",
        ),
        (
            {"temperature": 2.0, "kd_weight": 0.0, "alpha": 0.0},
            "--fdd-temperature 2.0: no effect, no divergence has a weight",
        ),
        (
            {"beta": 0.0, "delta": "centred"},
            "--fdd-delta centred: no effect, no term that has a weight depends on it",
        ),
        (
            {"beta": 0.0, "delta_detach_previous": True},
            "--fdd-delta-detach-previous: no effect, no term that has a weight compares a layer with the one before",
        ),
        (
            {**WITHOUT_TEACHER, "teacher_load": None, "tokens": "all"},
            "--fdd-tokens all: no effect, the cross-entropy with the data is over tokens with a label",
        ),
        (
            {"beta": 0.0, "layers": 1, "sample_one_tap": True},
            "--fdd-sample-one-tap: no effect, there is one tap to draw from; raise --fdd-layers",
        ),
        (
            {"alpha": 0.0, "layers": 2, "sample_one_tap": True},
            "--fdd-sample-one-tap: no effect, there is one tap to draw from; raise --fdd-layers",
        ),
        (
            {"offload_teacher_taps": True},
            "--fdd-offload-teacher-taps: no effect, with one pipeline stage the teacher's features do not wait",
        ),
    ],
)
def test_a_flag_without_effect_is_named_once(options: dict[str, Any], line: str) -> None:
    lines = said(options)
    assert line in lines
    flags = [word for each in lines for word in each.partition(": no effect")[0].split() if word[:2] == "--"]
    assert len(flags) == len(set(flags))
    assert said(options, rank=1) == []


@pytest.mark.parametrize(
    "options",
    [
        {"lens_head": "live"},
        {"beta": 0.0},
        {"delta": "centred"},
        {"kernels": "reference"},
        {"trajectory_divergence": "jsd"},
    ],
)
def test_a_bound_below_which_nothing_can_be_skipped_warns(options: dict[str, Any]) -> None:
    (line,) = said({"skip_below": 1e-5, **options})
    assert line.startswith("--fdd-skip-below 1e-05: no effect, ")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"teacher_fp8_recipe": "blockwise", "teacher_fp8_format": "e4m3"},
        {"sample_one_tap": True, "sample_tokens": 0.5, "skip_below": 1e-5, "layers": 3, "teacher_lens": "L"},
        {"layer_pairs": ((1, 2), (2, 4)), "lens_head": "live", "tap_dtype": "fp8", "tokens": "all"},
        {"divergence_mix": 0.3, "kd_divergence": "jsd", "temperature": 2.0, "alpha": 0.0},
        {"divergence_mix": 0.3, "trajectory_divergence": "sfkl", "temperature": 2.0, "kd_weight": 0.0},
        {"delta": "centred", "delta_detach_previous": True, "alpha": 0.0, "kd_weight": 0.0},
        {**WITHOUT_TEACHER, "teacher_load": None},
    ],
)
def test_a_flag_with_an_effect_is_not_named(options: dict[str, Any]) -> None:
    assert said(options) == []


def test_the_teachers_features_wait_between_stages() -> None:
    assert said({"offload_teacher_taps": True}, pipeline_model_parallel_size=2) == []


class Added(TapTerm):
    kind, title, caption = "added", "an added term", "An added term."

    def compute(self, window: TapWindow, context: TapContext) -> Tensor:
        raise NotImplementedError


def test_a_term_from_outside_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is the only one that looks at inner layers, or that depends on a flag."""
    alone = {**WITHOUT_TAPS, "term": (("added", 1.0),), "layers": 2, "delta": "centred"}
    monkeypatch.setattr(terms, "TERMS", [*terms.TERMS, Added()])
    (line,) = said(alone)
    assert line.startswith("--fdd-delta centred: no effect")
    monkeypatch.setattr(Added, "settings", ("tokens", "delta"))
    assert said(alone) == []


def test_every_flag_was_thought_of() -> None:
    listed = {name for names, _ in NO_EFFECT for name in names}
    assert listed.isdisjoint(ALWAYS)
    assert listed | ALWAYS == {field.name for field in dataclasses.fields(FddConfig)}


DECAYED = {"kd_weight": 0.0, "decay_iters": 50}


@pytest.mark.parametrize(
    ("options", "changes", "line"),
    [
        ({"warmup_iters": 400}, {}, "the training ends after 100 steps, .* never rise above 25%"),
        (DECAYED, {}, "after that step of 100 no term has a weight, and the student only decays"),
        (
            DECAYED,
            {
                "train_iters": None,
                "train_samples": 816,
                "global_batch_size": 8,
                "step_batch_size_schedule": None,
            },
            "after that step of 102 no term",
        ),
    ],
)
def test_a_schedule_that_does_not_fit_the_training_warns(
    options: dict[str, Any], changes: dict[str, Any], line: str
) -> None:
    with pytest.warns(UserWarning, match=line):
        warn_of_schedule(context(options, **changes))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"warmup_iters": 100}, {}),
        ({"decay_iters": 50}, {}),  # the final logits still count
        ({**DECAYED, "ce_weight": 1.0}, {}),
        ({**DECAYED, "decay_iters": 100}, {}),
        (DECAYED, {"rank": 1}),
        (DECAYED, {"skip_train": True}),
        ({"warmup_iters": 400, **WITHOUT_TAPS}, {}),
        (DECAYED, {"train_iters": None, "train_samples": 816, "step_batch_size_schedule": "0:8 99:16"}),
    ],
)
def test_a_schedule_that_fits_does_not_warn(options: dict[str, Any], changes: dict[str, Any]) -> None:
    warn_of_schedule(context(options, **changes))
