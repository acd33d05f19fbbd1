"""An optimizer that cannot go on from a checkpoint is refused before anything is loaded, with the flags of both."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from megatron_fdd.plan.context import StoredModel
from megatron_fdd.plan.resumption import _check_same_optimizer

ADAM = {"optimizer": "adam", "use_distributed_optimizer": False, "bf16": False, "decoupled_lr": None}
DISTRIBUTED = ADAM | {"use_distributed_optimizer": True}


def check(here: dict[str, Any], there: dict[str, Any]) -> None:
    stored = StoredModel("run", "--load", Path("run/iter_0000003"), argparse.Namespace(**there))
    _check_same_optimizer(argparse.Namespace(**here), stored)


@pytest.mark.parametrize(
    ("here", "there", "told"),
    [
        (ADAM | {"optimizer": "lion"}, ADAM, "--optimizer is lion here and adam there"),
        (ADAM, ADAM | {"optimizer": "sgd"}, "--optimizer is adam here and sgd there"),
        (DISTRIBUTED, ADAM, "--use-distributed-optimizer is True here and False there"),
        (ADAM, DISTRIBUTED, "--use-distributed-optimizer is False here and True there"),
        (ADAM | {"bf16": True}, ADAM, "--bf16 is True here and False there"),
        (ADAM | {"decoupled_lr": 1e-4}, ADAM, "--decoupled-lr is given here only"),
        (ADAM, ADAM | {"decoupled_lr": 1e-4}, "--decoupled-lr is given there only"),
    ],
)
def test_another_kind_is_refused(here: dict[str, Any], there: dict[str, Any], told: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^--load run: its optimizer .*: {told}\. Give these .*--no-load-optim"
    ):
        check(here, there)


def test_what_megatron_cannot_load_is_refused() -> None:
    sgd = ADAM | {"optimizer": "sgd"}
    with pytest.raises(
        ValueError, match=r"^--load run: Megatron saves the state of --optimizer sgd and cannot load"
    ):
        check(sgd, sgd)


@pytest.mark.parametrize("there", [ADAM, {}, {"optimizer": "adam"}])
def test_the_same_kind_goes_on(there: dict[str, Any]) -> None:
    check(ADAM, there)
    check(DISTRIBUTED | {"bf16": True}, there | {"use_distributed_optimizer": True})
    check(ADAM | {"decoupled_lr": 1e-4}, there | {"decoupled_lr": 1e-3})
