"""The shapes and command lines of the step benchmark's runs."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

from benchmarks.step_flops import Model, Objective
from megatron_fdd.plan.model_shape import ModelShape

WEIGHTS: dict[Objective, str] = {
    "FDD": "--fdd-alpha 1 --fdd-beta 1 --fdd-kd-weight 1 --fdd-ce-weight 0",
    "logit KD": "--fdd-alpha 0 --fdd-beta 0 --fdd-kd-weight 1 --fdd-ce-weight 0",
    "cross-entropy": "--fdd-alpha 0 --fdd-beta 0 --fdd-kd-weight 0 --fdd-ce-weight 1",
}
# Modules that need no package beside Megatron. A rehearsal overrides these with its own flags.
PLAIN_MODULES = "--transformer-impl local " + " ".join(
    f"--no-{name}" for name in ("persist-layer-norm", "gradient-accumulation-fusion", "masked-softmax-fusion")
)
SIZES = {
    "cpu": {
        "teacher_width": 400, "student_width": 192, "vocab_size": 12564, "seq_length": 256, "micro_batch_size": 4
    },
    "cuda": {
        "teacher_width": 1600, "student_width": 768, "vocab_size": 50257, "seq_length": 1024, "micro_batch_size": 8
    },
}  # fmt: skip
SMOKE = {
    "teacher_width": 48, "teacher_layers": 6, "teacher_heads": 3, "student_width": 32, "student_layers": 5,
    "student_heads": 2, "vocab_size": 199, "seq_length": 16, "micro_batch_size": 2, "repeats": 2,
}  # fmt: skip


def modules(device: str) -> str:
    """Return flags that choose Megatron's modules: on a GPU TransformerEngine's, if it is installed."""
    if device == "cuda" and importlib.util.find_spec("transformer_engine") is not None:
        return "--transformer-impl transformer_engine"
    return PLAIN_MODULES


def architecture(args: argparse.Namespace, whose: str) -> dict[str, Any]:
    """Return a GPT-2 in Megatron's arguments: learned positions, LayerNorm, biases, tied embeddings."""
    width = getattr(args, f"{whose}_width")
    return {
        "num_layers": getattr(args, f"{whose}_layers"),
        "hidden_size": width,
        "ffn_hidden_size": 4 * width,
        "num_attention_heads": getattr(args, f"{whose}_heads"),
        "max_position_embeddings": args.seq_length,
        "seq_length": args.seq_length,
        "vocab_size": args.vocab_size,
        "position_embedding_type": "learned_absolute",
        "untie_embeddings_and_output_weights": False,
    }


def model_of(args: argparse.Namespace, whose: str) -> Model:
    """Return the same model for the arithmetic."""
    names = architecture(args, whose)
    width, heads = names["hidden_size"], names["num_attention_heads"]
    shape = ModelShape(
        hidden=width,
        ffn=4 * width,
        heads=heads,
        groups=heads,
        head_width=width // heads,
        vocab=args.vocab_size,
        gated=False,
        seq_length=args.seq_length,
    )
    return Model(shape, names["num_layers"])


def command(args: argparse.Namespace, folder: Path, objective: Objective, rest: list[str]) -> tuple[str, ...]:
    """Return the flags of `megatron_fdd.distill`."""
    flags = (
        f"--load {folder / 'student'} --use-checkpoint-args --mock-data --tokenizer-type NullTokenizer "
        f"--seq-length {args.seq_length} --micro-batch-size {args.micro_batch_size} "
        f"--global-batch-size {args.micro_batch_size * args.micro_batches} --lr 1e-4 --clip-grad 1.0 "
        "--eval-iters 0 --eval-interval 1000 --log-interval 1 --hidden-dropout 0 --attention-dropout 0 "
        f"--fdd-layers {args.taps} {modules(args.device)} {WEIGHTS[objective]} "
    )
    if objective != "cross-entropy":
        flags += f"--teacher-load {folder / 'teacher'} "
    return (*flags.split(), *(["--bf16"] if args.bf16 else []), *rest)
