"""What skipping vocabulary tiles of negligible probability gains and costs, on a real pair of models and real text.

    python -m benchmarks.skipping --teacher-hf DIR --student-hf DIR --text FILE

Features are those of K sampled layers of both models, normed and projected as the lens does. Losses are exact
whatever is skipped; the error is that of the gradient of trajectory and log-sum-exp to the student's features.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.measure import Measurement, machine, measure, record, table
from megatron_fdd.losses.pairs import sample_blocks
from megatron_fdd.ops import torch_sweeps
from megatron_fdd.ops.linear_kl import Divergence, Heads, Implementation, VocabShard, linear_kl

THRESHOLDS = (0.0, 1e-6, 1e-5, 1e-4, 1e-3)
TILES = (2048, 512)


@dataclass(frozen=True)
class Features:
    """Normed features [N, width] of each sampled layer, and both heads."""

    teacher: list[Tensor]
    student: list[Tensor]
    teacher_head_WT: Tensor
    student_head_WD: Tensor


@torch.no_grad()
def lens_features(folder: Path, text: str, tokens: int, layers: int) -> tuple[list[Tensor], Tensor]:
    """Return features and head of a Hugging Face Llama for the first tokens of the text, 256 at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[0, :tokens]
    if len(ids) < tokens:
        raise SystemExit(f"--text has {len(ids)} tokens, --tokens asks for {tokens}: give a longer text")
    rows = ids.view(-1, 256) if tokens % 256 == 0 else ids[None]
    states = model.model(rows, output_hidden_states=True).hidden_states
    blocks = sample_blocks("paper", layers, model.config.num_hidden_layers, str(folder))
    return [model.model.norm(states[block]).flatten(0, 1) for block in blocks], model.lm_head.weight.detach()


def gradients(given: Features, implementation: Implementation) -> list[Tensor]:
    """Return the gradients of every layer's trajectory and log-sum-exp to the student's features."""
    found = []
    for teacher, student in zip(given.teacher, given.student, strict=True):
        leaf = student.clone().requires_grad_()
        shard = VocabShard(0, len(given.teacher_head_WT), None)
        heads = Heads(given.teacher_head_WT, given.student_head_WD, shard, implementation)
        out = linear_kl(teacher, leaf, heads, divergence=Divergence())
        assert out.divergence_N is not None
        assert out.student_lse_N is not None
        found.append(torch.autograd.grad(out.divergence_N.sum() + 0.1 * out.student_lse_N.sum(), leaf)[0])
    return found


def kept_share(given: Features, implementation: Implementation) -> float:
    """Return the share of tiles, over the rows of both models, whose product is computed."""
    seen = kept = 0
    original = torch_sweeps.kept_rows

    def count(gap_M: Tensor, skip_below: float) -> Tensor:
        nonlocal seen, kept
        rows = original(gap_M, skip_below)
        seen, kept = seen + len(gap_M), kept + len(rows)
        return rows

    with patch.object(torch_sweeps, "kept_rows", count):
        gradients(given, implementation)
    return kept / seen if seen else 1.0


def make(given: Features, implementation: Implementation) -> Callable[[], object]:
    """Return a function that computes the gradients."""
    return lambda: gradients(given, implementation)


def main() -> int:
    """Measure and print; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher-hf", type=Path, required=True, help="folder of the teacher")
    parser.add_argument("--student-hf", type=Path, required=True, help="folder of the student")
    parser.add_argument("--text", type=Path, required=True, help="plain text")
    parser.add_argument("--tokens", type=int, default=1024, help="(%(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="sampled of each model (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="of which the median counts (%(default)s)")
    args = parser.parse_args()
    text = args.text.read_text()
    teacher, teacher_head = lens_features(args.teacher_hf, text, args.tokens, args.layers)
    student, student_head = lens_features(args.student_hf, text, args.tokens, args.layers)
    given = Features(teacher, student, teacher_head, student_head)
    rows: dict[str, Measurement] = {}
    errors: dict[str, list[float]] = {}
    exact = torch.stack(gradients(given, Implementation("torch")))
    for tile in TILES:
        for threshold in THRESHOLDS:
            implementation = Implementation("torch", tile_size=tile, skip_below=threshold)
            name = f"tile {tile}, " + (f"skip below {threshold:.0e}" if threshold else "nothing skipped")
            found = torch.stack(gradients(given, implementation))
            error = ((found - exact).norm() / exact.norm()).item()
            cosine = torch.nn.functional.cosine_similarity(
                found.double().flatten(), exact.double().flatten(), 0
            ).item()
            errors[name] = [kept_share(given, implementation) if threshold else 1.0, error, 1 - cosine]
            rows[name] = measure(partial(make, given, implementation), args.repeats)
    base = next(iter(rows))
    print(f"{machine()}; torch {torch.__version__}; {args.tokens} tokens, vocabulary {len(teacher_head)}\n")
    print(table(rows, base, "x exact"))
    print(f"\n{'':<36}{'kept':>8}{'gradient error':>16}{'1 - cosine':>12}")
    for name, (kept, error, away) in errors.items():
        print(f"{name:<36}{kept:>8.1%}{error:>16.1e}{away:>12.1e}")
    size = {"tokens": args.tokens, "vocab": len(teacher_head), "layers": args.layers}
    record("skipping", size, rows, kept_error_cosine=errors)
    return 0


if __name__ == "__main__":
    sys.exit(main())
