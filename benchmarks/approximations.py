"""What each approximation of the inner terms gains and costs: its time, its error on every term, a short training.

    python -m benchmarks.approximations --teacher-hf DIR --text FILE

prints three tables and appends to the results file. DIR is a small Llama with a SentencePiece or Hugging Face
tokenizer; FILE has stories between lines `<|endoftext|>`. The time is that of trajectory and delta at the size of
the project's bar. The errors are those of one step of a trained student, over many draws on one batch. Students are
trained from scratch through the real entry point and evaluated with all tokens and all taps. Memory is not
compared, because on a CPU freed memory stays resident.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Measurement, measure, record, table
from megatron_fdd.config import FddConfig, add_fdd_args
from megatron_fdd.losses.chunk_loss import StepSettings
from megatron_fdd.losses.features import TeacherFeatures
from megatron_fdd.losses.layer_plan import ChunkPlan
from megatron_fdd.losses.lens import Lens, TeacherLens
from megatron_fdd.losses.objective import Objective
from megatron_fdd.losses.pairs import LayerPair
from megatron_fdd.losses.sampling import Sampler, StepDraw
from megatron_fdd.losses.tap import TokenWeights
from megatron_fdd.ops.head_grams import StepGrams
from megatron_fdd.ops.linear_kl import VocabShard

EXACT = "exact"
VARIANTS: dict[str, list[str]] = {
    EXACT: [],
    "1/4 of the tokens": ["--fdd-sample-tokens", "0.25"],
    "one tap": ["--fdd-sample-one-tap"],
    "both": ["--fdd-sample-tokens", "0.25", "--fdd-sample-one-tap"],
}
# Tokens, vocabulary, widths of teacher and student.
TIMED = {"tokens": 1024, "vocabulary": 32000, "teacher": 768, "student": 384, "taps": 4}
STUDENT = (
    "--num-layers 5 --hidden-size 32 --ffn-hidden-size 88 --num-attention-heads 4 --group-query-attention "
    "--num-query-groups 2 --max-position-embeddings 512 --position-embedding-type rope --normalization RMSNorm "
    "--swiglu --disable-bias-linear --untie-embeddings-and-output-weights --init-method-std 0.1"
).split()
LENGTH, BATCH, MICRO_BATCH = 128, 8, 4
RUN = (
    f"--seq-length {LENGTH} --micro-batch-size {MICRO_BATCH} --global-batch-size {BATCH} --log-interval 1 "
    "--hidden-dropout 0 --attention-dropout 0 --fdd-layers 4 --split 90,10,0"
).split()
TERMS = ("total", "kd", "trajectory", "delta")


def main() -> int:
    """Measure, print and record; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher-hf", type=Path, required=True, help="folder of the teacher")
    parser.add_argument(
        "--text", type=Path, required=True, help="stories, each ended by a line <|endoftext|>"
    )
    parser.add_argument("--steps", type=int, default=100, help="of each training (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each variant (%(default)s)")
    parser.add_argument("--draws", type=int, default=64, help="for the errors of one step (%(default)s)")
    args = parser.parse_args()
    times = {name: time_of(name) for name in VARIANTS}
    print(f"trajectory and delta of a micro-batch, forward and backward, {TIMED}")
    print(table(times, EXACT, "x exact"), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder), args.teacher_hf, args.text)
        training = trainings(runs, args.steps, args.seeds)
        print_training(training, args.steps)
        errors = step_errors(runs, args.draws)
        print_errors(errors, args.draws)
    size = {
        "timed": TIMED,
        "steps": args.steps,
        "seeds": args.seeds,
        "tokens": BATCH * LENGTH,
        "draws": args.draws,
    }
    record("approximations", size, times, variants=VARIANTS, training=training, errors=errors)
    return 0


def config_of(variant: str) -> FddConfig:
    words = ["--teacher-load", "none", *VARIANTS[variant]]
    return FddConfig.from_args(add_fdd_args(argparse.ArgumentParser()).parse_args(words))


def time_of(variant: str) -> Measurement:
    """Measure one micro-batch; with one tap, the mean over all taps that can be drawn."""
    config = config_of(variant)
    found = measure(lambda: timed_step(config), repeats=3)
    return replace(found, seconds=found.seconds / (TIMED["taps"] if config.sample_one_tap else 1))


def timed_step(config: FddConfig) -> Callable[[], None]:
    """Return a step of all taps on one chunk, with existing Gram matrices.

    If one tap is drawn, the step runs each of them once.
    """
    num_taps, tokens = TIMED["taps"], TIMED["tokens"]
    shard = VocabShard(0, TIMED["vocabulary"], None)
    chunk = ChunkPlan(tuple(range(num_taps)), None, None, is_first=True, is_last=True)
    pairs = [LayerPair(layer, layer) for layer in range(1, num_taps + 1)]
    teacher_head, student_head = (
        torch.randn(TIMED["vocabulary"], TIMED[model]) * 0.05 for model in ("teacher", "student")
    )
    grams = StepGrams()
    objective = Objective(config, pairs, chunk, shard, grams, TeacherLens(Lens(teacher_head, None)))
    taps = {index: torch.randn(tokens, 1, TIMED["teacher"]) for index in range(num_taps)}
    hidden = [torch.randn(tokens, 1, TIMED["student"], requires_grad=True) for _ in range(num_taps)]
    weights = TokenWeights(torch.ones(tokens), torch.ones(tokens))

    def step(draw: StepDraw) -> None:
        # No new step: its Gram matrices are made once for many micro-batches.
        objective.settings = StepSettings(draw=draw)
        loss, _ = objective.inner(
            hidden, None, Lens(student_head, None), TeacherFeatures(None, taps), draw.rows(weights, 0)
        )
        assert loss.total is not None
        loss.total.backward()

    sampler = Sampler(config, num_taps, seed=0, place=0)
    draws = {draw.tap: draw for draw in map(sampler.draw, range(100))}

    def every_tap() -> None:
        for draw in draws.values():
            step(draw)

    return every_tap


class Runs:
    """Runs of the entry point on one teacher, one text and one student.

    Args:
        folder: where all files are made.
    """

    def __init__(self, folder: Path, teacher_hf: Path, text: Path) -> None:
        self.folder = folder
        is_sentencepiece = (teacher_hf / "tokenizer.model").is_file()
        tokenizer = [
            "--tokenizer-type",
            "SentencePieceTokenizer" if is_sentencepiece else "HuggingFaceTokenizer",
        ]
        tokenizer += ["--tokenizer-model", teacher_hf / "tokenizer.model" if is_sentencepiece else teacher_hf]
        teacher = folder / "teacher"
        call(sys.executable, "tools/hf_to_mcore.py", "--hf-model", teacher_hf, "--save", teacher)
        call(
            *(sys.executable, "tools/prepare_data.py", "--input", text, "--output-prefix", folder / "text"),
            *("--document-separator", "<|endoftext|>", "--append-eod", *tokenizer),
        )
        self._flags = [*RUN, *tokenizer, "--teacher-load", teacher, "--data-path", folder / "text"]

    def entry(self, module: str, *words: object) -> str:
        """Run a module on one rank; return what it printed."""
        launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m", module)
        return call(sys.executable, *launch, *words)

    def train(self, variant: str, steps: int, seed: int) -> dict[str, float]:
        """Train a student from scratch; return its terms on validation data, with all tokens and all taps."""
        save = self.folder / f"{variant.replace(' ', '-').replace('/', '-')}-{seed}"
        out = self.entry(
            "megatron_fdd.distill",
            *(*self._flags, *STUDENT, *VARIANTS[variant], "--seed", seed, "--train-iters", steps),
            *("--lr", 3e-3, "--lr-warmup-iters", steps // 10, "--save", save, "--save-interval", steps),
            *("--eval-interval", steps, "--eval-iters", 16, "--fdd-verbose"),
        )
        line = [line for line in out.splitlines() if "validation loss at iteration" in line][-1]
        found = dict(re.findall(r"\| ([\w :]+?) value: ([-\d.E+]+)", line))
        return {name: float(found[name]) for name in TERMS}

    def repeat(self, variant: str, student: Path, draws: int) -> dict[str, Any]:
        """Return means and gradients of so many draws on one batch, with an unchanged student."""
        file = self.folder / "repeated.pt"
        self.entry(
            "benchmarks.repeated_batch",
            *(
                file,
                *self._flags,
                *VARIANTS[variant],
                "--pretrained-checkpoint",
                student,
                "--use-checkpoint-args",
            ),
            *("--train-iters", draws),
        )
        return torch.load(file)


def call(*words: object) -> str:
    """Run a command at the root of the checkout; return its standard output.

    Raises:
        RuntimeError: the command failed; holds its last lines.
    """
    done = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    if done.returncode:
        raise RuntimeError(f"{words} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}")
    return done.stdout


def trainings(runs: Runs, steps: int, seeds: int) -> dict[str, dict[str, list[float]]]:
    """Return, for each variant and term, the final value of each seed."""
    results: dict[str, dict[str, list[float]]] = {}
    for name in VARIANTS:
        ends = [runs.train(name, steps, seed) for seed in range(1, seeds + 1)]
        results[name] = {term: [end[term] for end in ends] for term in TERMS}
    return results


def print_training(results: dict[str, dict[str, list[float]]], steps: int) -> None:
    """Print the mean over seeds, and mean and spread of the difference from the exact run with the same seed."""
    print(f"\nafter {steps} steps of {BATCH * LENGTH} tokens; validation with all tokens and taps:")
    print(f"{'':<20}" + "".join(f"{term:>14}" for term in TERMS) + f"{'total - exact':>22}")
    for name, terms in results.items():
        differences = [a - b for a, b in zip(terms["total"], results[EXACT]["total"], strict=True)]
        spread = statistics.stdev(differences) if len(differences) > 1 else 0.0
        means = "".join(f"{statistics.mean(terms[term]):>14.4f}" for term in TERMS)
        print(f"{name:<20}{means}{statistics.mean(differences):>+12.4f} +- {spread:.4f}", flush=True)


def step_errors(runs: Runs, draws: int) -> dict[str, dict[str, float]]:
    """Return, for each variant, the errors of `draws` draws, at the final student of the exact run with seed 1."""
    student = runs.folder / f"{EXACT}-1"
    exact = runs.repeat(EXACT, student, 2)
    return {name: errors_of(runs.repeat(name, student, draws), exact) for name in VARIANTS}


def errors_of(drawn: dict[str, Any], exact: dict[str, Any]) -> dict[str, float]:
    """Return the errors of draws, relative to the exact step.

    Returns: for each term the standard deviation of its value ("kd") and the error of its mean over the draws ("kd
        bias"); for the gradient its deviation ("gradient"), the error of the mean gradient ("gradient bias"), the
        deviation of its norm ("norm"), and mean and smallest cosine with the exact gradient ("cosine", "smallest").
    """
    errors: dict[str, float] = {}
    whole = exact["means"][0]
    for name in whole:
        if name.startswith("share"):
            continue
        values_D = torch.stack([each[name] for each in drawn["means"]]).double()
        deviation_D = values_D / whole[name].double() - 1
        errors[name] = deviation_D.square().mean().sqrt().item()
        errors[f"{name} bias"] = deviation_D.mean().item()
    gradient_DP, exact_P = drawn["gradient_DP"].double(), exact["gradient_DP"][0].double()
    cosine_D = torch.nn.functional.cosine_similarity(gradient_DP, exact_P[None])
    errors["gradient"] = relative((gradient_DP - exact_P).square().sum(1).mean().sqrt(), exact_P)
    errors["gradient bias"] = relative((gradient_DP.mean(0) - exact_P).norm(), exact_P)
    errors["norm"] = (gradient_DP.norm(dim=1) / exact_P.norm() - 1).square().mean().sqrt().item()
    return errors | {"cosine": cosine_D.mean().item(), "smallest": cosine_D.min().item()}


def relative(length: Tensor, vector: Tensor) -> float:
    return (length / vector.norm()).item()


def print_errors(errors: dict[str, dict[str, float]], draws: int) -> None:
    """Print terms and gradient as rows, variants as columns."""
    print(f"\nerror of a step of {BATCH * LENGTH} tokens, {draws} draws, relative to the exact step;")
    print(f"a bias of less than about {2 / draws**0.5:.2f} of its error is none:")
    print(f"{'':<26}" + "".join(f"{name:>20}" for name in errors))
    for row in errors[EXACT]:
        shown = "".join(f"{each[row]:>20.4f}" for each in errors.values())
        print(f"{row:<26}{shown}")


if __name__ == "__main__":
    sys.exit(main())
