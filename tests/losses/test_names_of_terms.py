"""All that lists the terms of the loss by name lists the same ones, in the same order."""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any, cast

from megatron_fdd.config import FddConfig, add_fdd_args
from megatron_fdd.distill import Distillation
from megatron_fdd.evaluate.report import heat_maps, panels, scores
from megatron_fdd.evaluate.report.metrics import TERMS
from megatron_fdd.losses.layer_plan import LayerPair
from megatron_fdd.losses.objective import Objective
from megatron_fdd.step import metrics

PAIRS = (LayerPair(1, 2), LayerPair(2, 4))


def with_every_term() -> FddConfig:
    """Every flag that is the weight of a term is 1."""
    flags = add_fdd_args(argparse.ArgumentParser())._actions
    weights = [flag.dest.removeprefix("fdd_") for flag in flags if (flag.help or "").startswith("weight of ")]
    assert len(weights) >= 4
    return FddConfig(**cast(dict[str, Any], dict.fromkeys(weights, 1.0)))


def test_every_list_of_terms_is_that_of_the_objective() -> None:
    config, unused = with_every_term(), cast(Any, None)
    names = Objective(config, PAIRS, unused, unused, unused).term_names
    kinds = tuple(dict.fromkeys(name.split()[0] for name in names))
    assert kinds == metrics._GROUPS
    assert Distillation(cast(Any, SimpleNamespace(config=config)))._progress._terms == kinds
    assert ("total", *kinds) == TERMS == tuple(panel.key for panel in panels.LOSSES)
    assert tuple(scores._DEFINITION) == tuple(panels._TERM_COLORS) == kinds
    of_layers = [kind for kind in kinds if f"{kind} {PAIRS[1].name}" in names]
    assert [*heat_maps._UNITS] == [*heat_maps._TITLES] == [*heat_maps._WHAT] == of_layers
