"""Small distillations through the real entry point, each in processes of its own, on one GPU, several, or CPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

# A process that needs longer hangs.
TIMEOUT_S = 240
SEQUENCE, VOCABULARY = 64, 1999
TE = "--transformer-impl transformer_engine"
LOCAL = "--transformer-impl local"
COMMON = (
    f"--use-checkpoint-args --mock-data --tokenizer-type NullTokenizer --vocab-size {VOCABULARY} "
    f"--seq-length {SEQUENCE} --micro-batch-size 2 --global-batch-size 8 --lr 1e-3 --lr-decay-iters 8 "
    "--train-iters 6 --eval-interval 100 --eval-iters 0 --log-interval 1 --hidden-dropout 0 --attention-dropout 0 "
    "--fdd-layers 2 --fdd-ce-weight 0.1 --seed 7 --fdd-verbose"
)
TERMS = ("ce", "kd", "trajectory", "delta", "grad_norm")


def architecture(width: int, layers: int) -> dict[str, Any]:
    """Return the fields of a GPT-2."""
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


MAKER = """
import sys
from pathlib import Path
from benchmarks.step_run import make_checkpoint
for name, shape in eval(sys.argv[2]).items():
    make_checkpoint(Path(sys.argv[1]) / name, shape, Path(sys.argv[1]) / f"{name}.log")
"""


def make_models(root: Path) -> None:
    """Make a teacher and a student as Megatron checkpoints, on the host."""
    shapes = {"teacher": architecture(192, 6), "student": architecture(128, 5)}
    command = [sys.executable, "-c", MAKER, str(root), repr(shapes)]
    subprocess.run(command, env=os.environ | {"FDD_REHEARSE": "0"}, timeout=TIMEOUT_S, check=True)


def start(
    folder: Path,
    models: Path,
    flags: str,
    *,
    device: str = "cuda",
    ranks: int | None = None,
    module: str = "megatron_fdd.distill",
) -> subprocess.Popen:
    """Start a training in a process of its own; its output and its metrics file are in `folder`.

    Args:
        ranks: how many ranks torchrun starts.
        module: the module that each rank runs.
    """
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m"]
    if ranks is not None:
        command += f"torch.distributed.run --standalone --nproc-per-node {ranks} -m".split()
    command += [module, "--teacher-load", str(models / "teacher")]
    command += [*COMMON.split(), "--fdd-metrics-file", str(folder / "metrics.jsonl"), *flags.split()]
    if "--load" not in flags:
        command += ["--load", str(models / "student")]
    environment = {"FDD_REHEARSE": "0", "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE": "1"}
    if ranks is None:
        environment |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        environment |= {"MASTER_PORT": "0"}
    if device == "cpu":
        environment |= {"FDD_REHEARSE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (folder / "log").open("w") as log:
        return subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log)


def records(folder: Path, process: subprocess.Popen) -> list[dict[str, Any]]:
    """Return the records of the metrics file, after the process has ended well."""
    status = process.wait(timeout=TIMEOUT_S)
    assert status == 0, (folder / "log").read_text()[-6000:]
    return read_metrics(folder)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the records of the steps so far."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def farthest(ours: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> float:
    """Return the largest distance over all terms and steps, relative to the term's value in the first step.

    Later values are differences of similar models.
    """
    assert len(ours) == len(wanted)
    return max(
        abs(record[name] - other[name]) / abs(wanted[0][name])
        for record, other in zip(ours, wanted, strict=True)
        for name in TERMS
    )


def assert_close(ours: list[dict[str, Any]], wanted: list[dict[str, Any]], tolerance: float) -> None:
    assert farthest(ours, wanted) <= tolerance, (ours, wanted)
