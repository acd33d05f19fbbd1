"""Runs on GPUs without TransformerEngine and apex: local modules need only Megatron and torch.

FDD_REHEARSE=0 leaves flags and modules as on a GPU; the devices stay CPUs.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.entry.checks import assert_refused
from tests.entry.command import read_metrics, run, trained, without_seconds
from tests.entry.conftest import Toys

IMAGE = "tests.harness.plain_rank_image"
NO_REHEARSAL = {"FDD_REHEARSE": "0", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
# Flags that a CPU needs and a GPU does not.
ON_CPUS = (
    "--distributed-backend gloo --attention-backend unfused --use-cpu-initialization --num-workers 0".split()
)
LOCAL = ["--transformer-impl", "local"]


@pytest.mark.parametrize(
    "layout",
    [pytest.param("", marks=pytest.mark.tier("all")), "--tensor-model-parallel-size 2 --sequence-parallel"],
)
def test_local_modules_train_as_in_a_rehearsal(layout: str, toy: Toys, tmp_path: Path) -> None:
    """The run has every fusion that is on by default."""
    files = [tmp_path / name for name in ("plain.jsonl", "rehearsed.jsonl")]
    plain, rehearsed = (toy.command(*layout.split(), "--fdd-metrics-file", file) for file in files)
    trained([*plain, *LOCAL, *ON_CPUS], environment=NO_REHEARSAL, image=IMAGE)
    trained(rehearsed)
    for record, wanted in zip(*(without_seconds(read_metrics(file)) for file in files), strict=True):
        assert record == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        (
            "",
            r"--transformer-impl transformer_engine \(Megatron's default\): TransformerEngine is not installed",
        ),
        ("--teacher-fp8-format e4m3", r"--fp8-format.*TransformerEngine is not installed"),
        (
            "--context-parallel-size 2 --transformer-impl local",
            r"--context-parallel-size above 1.*cannot; use",
        ),
        (
            "--dataloader-inter-document-masking --transformer-impl local",
            r"--dataloader-inter-document-masking: Megatron's local attention cannot; use",
        ),
    ],
)
def test_what_needs_transformer_engine_says_so(flags: str, pattern: str, toy: Toys) -> None:
    command = toy.command(*flags.split(), *ON_CPUS)
    [endings] = run(command, environment=NO_REHEARSAL, image=IMAGE)
    assert_refused(endings, pattern)
