"""Small distillations through the real entry point on a GPU, compared with the same run in float32 on a CPU."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.runs import LOCAL, TE, assert_close, make_models, records, start

# `DEVICE=cpu bash tests/gpu/run.sh` makes only the first comparison, of two runs on CPUs.
RUNS_WITHOUT_A_GPU = os.environ.get("DEVICE") == "cpu"

STAGGER_S = 0.5
FLAGS = {
    "cpu": "",
    "float32": LOCAL,
    "float32 torch": f"{LOCAL} --fdd-kernels torch",
    "bf16": f"{LOCAL} --bf16",
    "bf16 recompute": f"{LOCAL} --bf16 --recompute-granularity full --recompute-method block --recompute-num-layers 5",
    "bf16 fp8 taps": f"{LOCAL} --bf16 --fdd-tap-dtype fp8",
    "transformer engine": f"{TE} --bf16",
    "transformer engine recompute": f"{TE} --bf16 --recompute-granularity full --recompute-method block "
    "--recompute-num-layers 5",
    "transformer engine fp8 teacher": f"{TE} --bf16 --teacher-fp8-format hybrid",
    "transformer engine fp8": f"{TE} --bf16 --fp8-format hybrid --fp8-recipe tensorwise --teacher-fp8-format hybrid",
    "transformer engine fp8 delayed": f"{TE} --bf16 --fp8-format hybrid --teacher-fp8-format e4m3",
    "transformer engine fp8 blockwise": f"{TE} --bf16 --fp8-format e4m3 --fp8-recipe blockwise "
    "--teacher-fp8-format e4m3 --teacher-fp8-recipe blockwise",
    "transformer engine fp8 recompute": f"{TE} --bf16 --fp8-format hybrid --fp8-recipe tensorwise "
    "--recompute-granularity full --recompute-method block --recompute-num-layers 5 --first-last-layers-bf16",
}


class Runs:
    """Many short runs side by side; each spends most of its time on its start."""

    def __init__(self, root: Path, models: Path) -> None:
        self._root, self._models = root, models
        self._processes: dict[str, subprocess.Popen] = {}
        if RUNS_WITHOUT_A_GPU:
            for name in ("cpu", "float32"):
                self.start(name, FLAGS[name], device="cpu")
            return
        for name, flags in FLAGS.items():
            if not name.startswith("transformer engine") or importlib.util.find_spec("transformer_engine"):
                self.start(name, flags, device="cpu" if name == "cpu" else "cuda")
                time.sleep(STAGGER_S)  # each reads and imports gigabytes when it starts
        for name, more in (("whole", ""), ("stopped", "--exit-interval 4")):
            self.start(name, f"{self.resumable(name)} {more}")
        if "transformer engine" in self._processes:
            flags = (
                f"{FLAGS['transformer engine fp8 delayed']} --save {self.saved('scaled')} --save-interval 6"
            )
            self.start("scaled", flags)

    def start(self, name: str, flags: str, **options: Any) -> None:
        self._processes[name] = start(self._root / name, self._models, flags, **options)

    def saved(self, name: str) -> Path:
        return self._root / name / "checkpoint"

    def resumable(self, name: str) -> str:
        """Return the flags that start a run and continue it."""
        places = f"--load {self._root / name} --save {self._root / name} --pretrained-checkpoint "
        flags = f"{LOCAL} --bf16 --use-distributed-optimizer --save-interval 2 "
        return f"{flags} {places} {self._models / 'student'}"

    def allocated(self, name: str) -> float:
        """Return the MB of tensors that a finished run held between steps, from Megatron's log."""
        found = re.search(r"memory \(MB\).*? allocated: ([\d.]+)", (self._root / name / "log").read_text())
        assert found is not None
        return float(found[1])

    def __getitem__(self, name: str) -> list[dict[str, Any]]:
        if RUNS_WITHOUT_A_GPU and name not in self._processes:
            pytest.skip("needs a GPU (CUDA): on CPUs one run and its like are enough")
        return records(self._root / name, self._processes[name])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Start all runs, with a teacher and a student that another process made as Megatron checkpoints."""
    root = tmp_path_factory.mktemp("models")
    make_models(root)
    return Runs(tmp_path_factory.mktemp("runs"), root)


@pytest.mark.parametrize("name", ["float32", "float32 torch"])
def test_float32_gives_the_cpu_losses(name: str, runs: Runs) -> None:
    assert_close(runs[name], runs["cpu"], 1e-3)


def test_bf16_gives_nearly_the_cpu_losses(runs: Runs) -> None:
    assert_close(runs["bf16"], runs["cpu"], 3e-2)


def test_recompute_changes_nothing(runs: Runs) -> None:
    assert_close(runs["bf16 recompute"], runs["bf16"], 1e-3)


def test_fp8_taps_give_nearly_the_cpu_losses(runs: Runs) -> None:
    assert_close(runs["bf16 fp8 taps"], runs["cpu"], 5e-2)


@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [
        ("", 3e-2),
        (" recompute", 3e-2),
        (" fp8 teacher", 8e-2),
        (" fp8", 1e-1),
        (" fp8 delayed", 1e-1),
        (" fp8 blockwise", 1e-1),
        (" fp8 recompute", 1e-1),
    ],
)
def test_transformer_engine_gives_nearly_the_cpu_losses(precision: str, tolerance: float, runs: Runs) -> None:
    pytest.importorskip("transformer_engine.pytorch")
    ours = runs[f"transformer engine{precision}"]
    assert_close(ours, runs["cpu"], tolerance)
    if "fp8" in precision:
        assert ours[0]["kd"] != runs["transformer engine"][0]["kd"], "computed in bf16"
    if precision == " fp8 teacher":
        assert runs.allocated(f"transformer engine{precision}") < runs.allocated("transformer engine")


def test_resumes(runs: Runs) -> None:
    assert len(runs["stopped"]) == 4
    runs.start("stopped", runs.resumable("stopped"))
    assert [record["iteration"] for record in runs["stopped"]] == [1, 2, 3, 4, 5, 6]
    assert_close(runs["stopped"], runs["whole"], 1e-4)


def test_a_teacher_with_delayed_scaling_uses_its_scales(runs: Runs) -> None:
    pytest.importorskip("transformer_engine.pytorch")
    assert len(runs["scaled"]) == 6
    flags = f"{TE} --bf16 --teacher-load {runs.saved('scaled')}"
    runs.start("with its scales", f"{flags} --teacher-fp8-format hybrid --teacher-fp8-recipe delayed")
    runs.start("without", flags)
    ours, wanted = runs["with its scales"], runs["without"]
    assert_close(ours, wanted, 1e-1)
    assert ours[0]["kd"] != wanted[0]["kd"], "computed in bf16"
