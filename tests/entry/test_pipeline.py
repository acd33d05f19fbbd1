"""Layouts through the real entry point: the same metrics file, resumption at other layouts, overlap."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.entry.checks import assert_close, metrics
from tests.entry.command import trained
from tests.entry.conftest import Toys

LAYOUTS = {
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "pp4": (4, "--pipeline-model-parallel-size 4"),
    "tp2-pp2-sp": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel"),
    "pp2-dp2": (4, "--pipeline-model-parallel-size 2 --use-distributed-optimizer"),
    "pp2-uneven": (2, "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et|tttL"),
    "pp2-vpp2": (2, "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"),
    "pp2-vpp2-layout": (2, "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et|t|t|tL"),
    "cp2": (2, "--context-parallel-size 2"),
    "tp2-cp2-sp": (4, "--tensor-model-parallel-size 2 --context-parallel-size 2 --sequence-parallel"),
    "pp2-cp2": (4, "--pipeline-model-parallel-size 2 --context-parallel-size 2 --use-distributed-optimizer"),
    "pp2-offload": (2, "--pipeline-model-parallel-size 2 --fdd-offload-teacher-taps"),
    "pp2-first-stage": (2, "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 3"),
}
EVALUATED = ("--eval-interval", "2", "--eval-iters", "1")


@pytest.fixture(scope="module")
def on_one_rank(toy: Toys, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run on one rank."""
    folder = tmp_path_factory.mktemp("one-rank")
    trained(toy.saving_command(folder, *EVALUATED), ranks=1)
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_metrics_file_does_not_depend_on_the_layout(
    name: str, toy: Toys, on_one_rank: Path, tmp_path: Path
) -> None:
    ranks, flags = LAYOUTS[name]
    [endings] = trained(toy.saving_command(tmp_path, *flags.split(), *EVALUATED), ranks=ranks)
    assert_close(tmp_path, on_one_rank, 3 + 2)  # validation after step 2 and at the end
    assert "validation loss at iteration 2" in "".join(ending.out for ending in endings)


def test_resumes_at_other_layouts(toy: Toys, tmp_path: Path) -> None:
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    optimizer = ("--use-distributed-optimizer", "--train-iters", "6")
    four = LAYOUTS["tp2-pp2-sp"][1].split()
    start = [
        *toy.saving_command(moved, *optimizer),
        "--pretrained-checkpoint",
        str(toy.student),
        "--load",
        str(moved),
    ]
    trained(toy.saving_command(whole, *optimizer), ranks=1)
    trained(
        [*start, *four, "--exit-interval", "2"],
        [*start, "--pipeline-model-parallel-size", "4", "--exit-interval", "4"],
        start,
        ranks=4,
    )
    assert_close(moved, whole, 6)


def test_bf16_with_overlap(toy: Toys, tmp_path: Path) -> None:
    """Buckets have one parameter: a copy that is sent before the owner's new value has arrived would be stale."""
    plain, overlapped = tmp_path / "plain", tmp_path / "overlapped"
    flags = (*LAYOUTS["pp2-dp2"][1].split(), "--bf16", "--train-iters", "4")
    overlap = ("--overlap-grad-reduce", "--overlap-param-gather", "--ddp-bucket-size", "1")
    trained(toy.saving_command(plain, *flags), toy.saving_command(overlapped, *flags, *overlap), ranks=4)
    assert_close(overlapped, plain, 4)


def test_a_live_lens_with_overlap(toy: Toys, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    live = ("--fdd-lens-head", "live", "--train-iters", "4")
    overlap = ("--overlap-grad-reduce", "--overlap-param-gather", "--ddp-bucket-size", "1")
    trained(toy.saving_command(one, *live), ranks=1)
    trained(toy.saving_command(other, *live, *LAYOUTS["pp2-dp2"][1].split(), *overlap), ranks=4)
    assert_close(other, one, 4)


@pytest.mark.tier("all")
@pytest.mark.parametrize(("form", "least", "most"), [("fp8", 1e-5, 0.02), ("int8", 1e-6, 0.005)])
def test_packed_taps_are_the_same_in_every_layout(
    form: str, least: float, most: float, toy: Toys, on_one_rank: Path, tmp_path: Path
) -> None:
    """Taps wait and travel packed only under a pipeline; without a pipeline they are rounded too."""
    packed = ("--fdd-tap-dtype", form)
    folders = {name: tmp_path / name for name in ("one", "two", "four")}
    trained(toy.saving_command(folders["one"], *packed), ranks=1)
    # Blocks 1 and 2 of the student learn from blocks 2 and 4 of the teacher, one of which is on another stage.
    trained(toy.saving_command(folders["two"], *LAYOUTS["pp2-offload"][1].split(), *packed), ranks=2)
    trained(toy.saving_command(folders["four"], *LAYOUTS["tp2-pp2-sp"][1].split(), *packed), ranks=4)
    for name in ("two", "four"):
        assert_close(folders[name], folders["one"], 3)
    first, exact = metrics(folders["one"])[0], metrics(on_one_rank)[0]
    assert first["kd"] == exact["kd"]
    for term in ("trajectory", "delta"):
        assert least < abs(first[term] / exact[term] - 1) < most, term
