"""Small distillations through the real entry point on a GPU, beside the same run in float32 on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SEQUENCE, VOCABULARY = 64, 1999
LOCAL = "--transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion"
COMMON = (
    f"--use-checkpoint-args --mock-data --tokenizer-type NullTokenizer --vocab-size {VOCABULARY} "
    f"--seq-length {SEQUENCE} --micro-batch-size 2 --global-batch-size 8 --lr 1e-3 --lr-decay-iters 8 "
    "--train-iters 6 --eval-interval 100 --eval-iters 0 --log-interval 1 --hidden-dropout 0 --attention-dropout 0 "
    "--fdd-layers 2 --fdd-ce-weight 0.1 --seed 7"
)
TERMS = ("ce", "kd", "trajectory", "delta", "grad_norm")


def architecture(width: int, layers: int) -> dict[str, Any]:
    """A GPT-2."""
    return {
        "num_layers": layers,
        "hidden_size": width,
        "ffn_hidden_size": 4 * width,
        "num_attention_heads": width // 32,
        "max_position_embeddings": SEQUENCE,
        "seq_length": SEQUENCE,
        "vocab_size": VOCABULARY,
        "position_embedding_type": "learned_absolute",
        "untie_embeddings_and_output_weights": False,
    }


def run(folder: Path, models: Path, flags: str, *, device: str) -> list[dict[str, Any]]:
    """Train in a process of its own; the records of its metrics file."""
    folder.mkdir(exist_ok=True)
    metrics = folder / "metrics.jsonl"
    command = [sys.executable, "-m", "megatron_fdd.distill", "--teacher-load", str(models / "teacher")]
    command += [*COMMON.split(), "--fdd-metrics-file", str(metrics), *flags.split()]
    if "--load" not in flags:
        command += ["--load", str(models / "student")]
    one_rank = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    rehearses = (
        {"FDD_REHEARSE": "1", "CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {"FDD_REHEARSE": "0"}
    )
    result = subprocess.run(
        command, env=os.environ | one_rank | rehearses, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-6000:]}"
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def assert_close(ours: list[dict[str, Any]], wanted: list[dict[str, Any]], tolerance: float) -> None:
    assert len(ours) == len(wanted)
    for record, other in zip(ours, wanted, strict=True):
        for name in TERMS:
            assert record[name] == pytest.approx(other[name], rel=tolerance), (record, other)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher and a student as Megatron checkpoints, made by processes without a GPU."""
    root = tmp_path_factory.mktemp("models")
    script = (
        "import sys; from pathlib import Path; from benchmarks.step_run import make_checkpoint; "
        "make_checkpoint(Path(sys.argv[1]), eval(sys.argv[2]), Path(sys.argv[1] + '.log'))"
    )
    for name, shape in (("teacher", architecture(192, 6)), ("student", architecture(128, 5))):
        command = [sys.executable, "-c", script, str(root / name), repr(shape)]
        subprocess.run(command, check=True, env=os.environ | {"FDD_REHEARSE": "0"})
    return root


@pytest.fixture(scope="module")
def on_cpu(models: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The same run in float32 on a CPU."""
    return run(tmp_path_factory.mktemp("cpu"), models, "", device="cpu")


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_float32_gives_the_cpu_losses(kernels: str, models: Path, on_cpu: list, tmp_path: Path) -> None:
    assert_close(
        run(tmp_path / "gpu", models, f"{LOCAL} --fdd-kernels {kernels}", device="gpu"), on_cpu, 2e-4
    )


def test_bf16_gives_nearly_the_cpu_losses(models: Path, on_cpu: list, tmp_path: Path) -> None:
    assert_close(run(tmp_path / "gpu", models, f"{LOCAL} --bf16", device="gpu"), on_cpu, 2e-2)


def test_recompute_and_every_option_run(models: Path, tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", models, f"{LOCAL} --bf16", device="gpu")
    full = f"{LOCAL} --bf16 --recompute-granularity full --recompute-method block --recompute-num-layers 5"
    assert_close(run(tmp_path / "full", models, full, device="gpu"), plain, 1e-3)


def test_resumes(models: Path, tmp_path: Path) -> None:
    flags = f"{LOCAL} --bf16 --use-distributed-optimizer --save-interval 2"

    def places(name: str) -> str:
        folder = tmp_path / name
        return f"{flags} --load {folder} --save {folder} --pretrained-checkpoint {models / 'student'}"

    whole = run(tmp_path / "whole", models, places("whole"), device="gpu")
    run(tmp_path / "stopped", models, f"{places('stopped')} --exit-interval 4", device="gpu")
    resumed = run(tmp_path / "stopped", models, places("stopped"), device="gpu")
    assert_close(resumed, whole, 1e-3)
    assert [record["iteration"] for record in resumed] == [1, 2, 3, 4, 5, 6]


def test_transformer_engine_gives_nearly_the_cpu_losses(models: Path, on_cpu: list, tmp_path: Path) -> None:
    pytest.importorskip("transformer_engine.pytorch")
    flags = "--transformer-impl transformer_engine --bf16"
    assert_close(run(tmp_path / "te", models, flags, device="gpu"), on_cpu, 2e-2)
