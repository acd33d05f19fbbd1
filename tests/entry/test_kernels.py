"""The choice of kernels: a run is the same whichever kernels compute its losses, and refuses kernels it cannot run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.entry.checks import assert_refused
from tests.entry.command import TIMES, read_metrics, run, trained
from tests.entry.conftest import Toys


@pytest.mark.parametrize("layout", ["", "--tensor-model-parallel-size 2 --sequence-parallel"])
def test_the_reference_trains_alike(layout: str, toy: Toys, tmp_path: Path) -> None:
    """The run has a trained head and constant ones, and cross-entropy beside the divergences."""
    flags = "--train-iters 2 --fdd-ce-weight 0.5 --fdd-temperature 2 --fdd-kd-divergence jsd"
    files = {kind: tmp_path / f"{kind}.jsonl" for kind in ("torch", "reference")}
    options = [("--fdd-kernels", kind, "--fdd-metrics-file", file) for kind, file in files.items()]
    trained(*(toy.command(*flags.split(), *layout.split(), *each) for each in options), ranks=2)
    for record, wanted in zip(*(read_metrics(file) for file in files.values()), strict=True):
        for name, value in record.items():
            if name not in TIMES:
                assert value == pytest.approx(wanted[name], rel=2e-6), name


def test_triton_without_a_gpu_is_refused(toy: Toys) -> None:
    for endings in run(toy.command("--fdd-kernels", "triton"), ranks=2):
        assert_refused(endings, r"--fdd-kernels triton needs a GPU.*leave the flag out")
