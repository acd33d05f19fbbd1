"""The flags: defaults of the paper, bounds, schedules."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from megatron_fdd.config import FddConfig, add_fdd_args


def parse(*argv: str) -> FddConfig:
    return FddConfig.from_args(add_fdd_args(argparse.ArgumentParser()).parse_args(argv))


def test_defaults_are_the_papers() -> None:
    config = parse("--teacher-load", "T")
    assert config == FddConfig(teacher_load="T")
    assert (config.layers, config.alpha, config.beta, config.kd_weight, config.ce_weight) == (4, 1, 1, 1, 0)
    assert (config.kd_divergence, config.delta, config.lens_head) == ("fkl", "logprob", "detached")


def test_every_flag_arrives() -> None:
    argv = (
        "--teacher-load T --fdd-layers 3 --fdd-layer-rule linspace --fdd-layer-pairs 1:2,3:4 --fdd-alpha 0.5 "
        "--fdd-beta 0.25 --fdd-kd-weight 2 --fdd-ce-weight 0.1 --fdd-kd-divergence jsd "
        "--fdd-trajectory-divergence srkl --fdd-divergence-mix 0.3 --fdd-temperature 2 --fdd-lens-norm none "
        "--fdd-lens-head live --fdd-delta centred --fdd-delta-detach-previous --fdd-tokens all "
        "--fdd-warmup-iters 5 --fdd-decay-iters 50 --fdd-offload-teacher-taps --fdd-metrics-file M "
        "--fdd-dry-run --fdd-kernels torch --fdd-skip-below 1e-4 --teacher-expert-model-parallel-size 2 "
        "--fdd-sample-tokens 0.25 --fdd-sample-one-tap --fdd-tap-dtype fp8 --teacher-fp8-format hybrid "
        "--teacher-fp8-recipe blockwise --fdd-verbose"
    )
    config = parse(*argv.split())
    defaults = FddConfig()
    assert config.layer_pairs == ((1, 2), (3, 4))
    untouched = [name for name in FddConfig.__slots__ if getattr(config, name) == getattr(defaults, name)]
    assert untouched == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--fdd-alpha -1", "--fdd-alpha -1.0: must be at least 0"),
        ("--fdd-temperature 0", "--fdd-temperature 0.0: must be from 0.01 to 100"),
        ("--fdd-temperature 1e-30", "--fdd-temperature 1e-30: must be from 0.01 to 100"),
        ("--fdd-temperature 101", "--fdd-temperature 101.0: must be from 0.01 to 100"),
        ("--fdd-temperature nan", "--fdd-temperature nan: must be from 0.01 to 100"),
        (
            "--fdd-kd-weight 0 --fdd-alpha 0 --fdd-beta 0",
            "--fdd-ce-weight are all 0, so that nothing is trained",
        ),
        ("--fdd-divergence-mix 1", "--fdd-divergence-mix 1.0: must be between 0 and 1"),
        ("--fdd-layers 0", "--fdd-layers 0: must be at least 1"),
        ("--fdd-beta nan", "--fdd-beta nan: must be at least 0"),
        ("--fdd-kd-weight inf", "--fdd-kd-weight inf: must be at least 0, and finite"),
        ("--fdd-warmup-iters -2", "--fdd-warmup-iters -2: must be at least 0"),
        ("--fdd-layers 1", "needs at least 2, there is 1.*--fdd-beta 0"),
        ("--fdd-layer-pairs 3:5", "needs at least 2, there is 1"),
        ("--fdd-skip-below 1", "--fdd-skip-below 1.0: must be at least 0 and below 1"),
        ("--fdd-decay-iters -1", "--fdd-decay-iters -1: must be at least 0"),
        ("--fdd-sample-tokens 0", "--fdd-sample-tokens 0.0: must be above 0, and at most 1"),
        ("--fdd-sample-tokens 1.5", "--fdd-sample-tokens 1.5: must be above 0, and at most 1"),
        ("--fdd-sample-tokens nan", "--fdd-sample-tokens nan: must be above 0, and at most 1"),
    ],
)
def test_wrong_values_are_refused(argv: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse("--teacher-load", "T", *argv.split())


def test_a_term_that_needs_a_teacher_asks_for_one() -> None:
    with pytest.raises(ValueError, match="--teacher-load"):
        parse()
    parse("--fdd-kd-weight", "0", "--fdd-alpha", "0", "--fdd-beta", "0", "--fdd-ce-weight", "1")


@pytest.mark.parametrize(
    ("options", "scales"),
    [
        ({}, [1, 1, 1, 1, 1]),
        ({"warmup_iters": 4}, [0.25, 0.5, 0.75, 1, 1]),
        ({"decay_iters": 4}, [1, 0.75, 0.5, 0.25, 0]),
        ({"warmup_iters": 2, "decay_iters": 4}, [0.5, 0.75, 0.5, 0.25, 0]),
    ],
)
def test_alpha_and_beta_rise_and_fall(options: dict[str, Any], scales: list[float]) -> None:
    config = FddConfig(teacher_load="T", **options)
    assert [config.weight_scale(iteration) for iteration in range(5)] == scales
