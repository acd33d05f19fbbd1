"""Twenty steps of a toy teacher and student through the real entry point, the same wherever they run.

The weights come from one generator on the CPU, the data is Megatron's made-up text, and everything is in float32.
The only difference from `curve.txt`, which a CPU wrote, is rounding. This has never run on a GPU.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_fdd.convert import hf_to_mcore

NUM_STEPS = 20
COLUMNS = ("total", "ce", "kd", "trajectory", "delta", "grad_norm")
# An estimate: six steps of another toy came as near on one H100 (docs/support.md); this toy has not run there.
TOLERANCE = 1e-3
TIMEOUT_S = 600
_VOCABULARY = 96
_LAYERS = {"teacher": (6, 48), "student": (4, 32)}  # layers, width
_FLAGS = (
    "--use-checkpoint-args --transformer-impl local --attention-backend unfused --use-cpu-initialization "
    f"--mock-data --tokenizer-type NullTokenizer --vocab-size {_VOCABULARY} --num-workers 0 --seed 7 "
    f"--seq-length 32 --micro-batch-size 2 --global-batch-size 4 --train-iters {NUM_STEPS} --lr 3e-3 "
    f"--lr-decay-iters {NUM_STEPS} --lr-warmup-iters 2 --eval-interval 100 --eval-iters 0 --log-interval 100 "
    "--hidden-dropout 0 --attention-dropout 0 --fdd-layers 2 --fdd-ce-weight 0.5"
).split()

CurveRow = Mapping[str, float]


def committed() -> list[CurveRow]:
    """Return the curve that a CPU wrote."""
    text = (resources.files("megatron_fdd.doctor") / "curve.txt").read_text(encoding="utf-8")
    return [dict(zip(COLUMNS, map(float, line.split()), strict=True)) for line in text.splitlines()[1:]]


def distance(found: Sequence[CurveRow], wanted: Sequence[CurveRow]) -> float:
    """Return the largest relative difference of any column in any step; infinite if a number is not finite.

    Raises:
        RuntimeError: the numbers of steps differ.
    """
    if len(found) != len(wanted):
        raise RuntimeError(f"{len(found)} steps were made, {len(wanted)} are needed")
    pairs = zip(found, wanted, strict=True)
    differences = [
        abs(row[name] - other[name]) / abs(other[name]) for row, other in pairs for name in COLUMNS
    ]
    return max(each if math.isfinite(each) else math.inf for each in differences)


def steps(device: Literal["cuda", "cpu"]) -> list[CurveRow]:
    """Train with one process of torchrun, in a temporary folder, and return the curve.

    On CPUs this process becomes a rehearsal: from then on Megatron's `cuda` means `cpu` in it.

    Raises:
        RuntimeError: the run failed; holds its message on stderr.
    """
    with tempfile.TemporaryDirectory(prefix="fdd-doctor-") as name:
        folder = Path(name)
        for role in _LAYERS:
            write_model(folder / f"{role}-hf", role)
            hf_to_mcore(folder / f"{role}-hf", folder / role)
        _train(folder, device)
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [{column: record[column] for column in COLUMNS} for record in records]


def write_model(folder: Path, role: str) -> None:
    """Write a Llama as a Hugging Face folder; its weights are drawn in the order of their names."""
    num_layers, width = _LAYERS[role]
    heads = 4
    config: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": _VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": width // heads,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    generator = torch.Generator("cpu").manual_seed(num_layers)
    weights: dict[str, Tensor] = {}
    for name, shape in sorted(_shapes(num_layers, width).items()):
        noise = torch.randn(shape, generator=generator, device="cpu")
        weights[name] = 1 + 0.1 * noise if len(shape) == 1 else noise / width**0.5
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _shapes(num_layers: int, width: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (_VOCABULARY, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (_VOCABULARY, width),
    }
    for layer in range(num_layers):
        of_layer: dict[str, tuple[int, ...]] = {
            "input_layernorm": (width,),
            "post_attention_layernorm": (width,),
            "self_attn.q_proj": (width, width),
            "self_attn.k_proj": (width // 2, width),
            "self_attn.v_proj": (width // 2, width),
            "self_attn.o_proj": (width, width),
            "mlp.gate_proj": (2 * width, width),
            "mlp.up_proj": (2 * width, width),
            "mlp.down_proj": (width, 2 * width),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in of_layer.items()}
    return shapes


def _train(folder: Path, device: Literal["cuda", "cpu"]) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    places = {"--load": "student", "--teacher-load": "teacher", "--fdd-metrics-file": "metrics.jsonl"}
    flags = [word for flag, name in places.items() for word in (flag, str(folder / name))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    result = subprocess.run(
        [*launch, "-m", "megatron_fdd.distill", *_FLAGS, *flags],
        cwd=folder,
        env=environment | {"FDD_REHEARSE": "1" if device == "cpu" else "0"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if result.returncode:
        lines = result.stderr.splitlines()
        errors = [line for line in lines if "error: " in line.lower()] or lines[-1:] or ["no message"]
        raise RuntimeError(f"the toy run ended with exit status {result.returncode}: {errors[0]}")
