"""A whole Megatron step of ours: cross-entropy, plain logit distillation, and FDD, through the real entry point.

    python -m benchmarks.step                # on one CPU thread, minutes
    python -m benchmarks.step --device cuda --bf16    # undivided, 8 x 1,024 tokens
    python -m benchmarks.step --profile docs/step-profile.png    # then watch some steps, and draw where their time goes
    python -m benchmarks.step --smoke        # seconds; its figures mean nothing

The default shape is GPT-2 XL -> GPT-2 0.1B (the paper's hardest: a small student with a large vocabulary), on a CPU
with widths and vocabulary divided by four and all layers kept, which leaves the ratios of its flops as they are.
Weights are random, the data made up. "logit KD" is our own entry point with the weights of trajectory and delta at 0,
hence already fused; "stock Megatron" has none of our objective, and a [tokens, vocabulary] tensor. A flag that is not
listed here is passed on to Megatron.

Exit status 1: a measurement was too unsteady for a ratio, or FDD costs more than the bar.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

# One thread: of several, on a shared machine, the times do not repeat. Before torch is imported, here and in the runs.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import torch

from benchmarks import measure, step_profile
from benchmarks.step_flops import Model, Objective, StepFlops, step_flops
from benchmarks.step_run import Job, Watched, make_checkpoint, run_job
from megatron_fdd.balance import ModelShape

# FDD over logit KD in time, at most this much more than in flops.
BAR = 1.15
STOCK = "cross-entropy, stock Megatron"
WEIGHTS: dict[Objective, str] = {
    "cross-entropy": "--fdd-alpha 0 --fdd-beta 0 --fdd-kd-weight 0 --fdd-ce-weight 1",
    "logit KD": "--fdd-alpha 0 --fdd-beta 0 --fdd-kd-weight 1 --fdd-ce-weight 0",
    "FDD": "--fdd-alpha 1 --fdd-beta 1 --fdd-kd-weight 1 --fdd-ce-weight 0",
}
# Modules that need no package beside Megatron. A rehearsal puts its own flags over these.
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


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Ours, and the rest for Megatron."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of which the median counts")
    for whose, layers, heads in (("teacher", 48, 25), ("student", 12, 12)):
        parser.add_argument(f"--{whose}-width", type=int, help="(the device's default)")
        parser.add_argument(f"--{whose}-layers", type=int, default=layers)
        parser.add_argument(f"--{whose}-heads", type=int, default=heads)
    for name in ("vocab-size", "seq-length", "micro-batch-size"):
        parser.add_argument(f"--{name}", type=int, help="(the device's default)")
    parser.add_argument("--micro-batches", type=int, default=1, help="of a step")
    parser.add_argument("--taps", type=int, default=4, help="K, sampled layers of each model")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="PNG",
        help="draw the parts of a step, from more steps under torch's profiler",
    )
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, and nothing is recorded")
    args, rest = parser.parse_known_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    vars(args).update(
        {name: value for name, value in SIZES[args.device].items() if getattr(args, name) is None}
    )
    if args.smoke:
        vars(args).update(SMOKE)
    return args, rest


def architecture(args: argparse.Namespace, whose: str) -> dict[str, Any]:
    """A GPT-2 in Megatron's arguments: learned positions, LayerNorm, biases, tied embeddings."""
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
    """The same for the arithmetic."""
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
    """Flags of `megatron_fdd.distill`."""
    flags = (
        f"--load {folder / 'student'} --use-checkpoint-args --mock-data --tokenizer-type NullTokenizer "
        f"--seq-length {args.seq_length} --micro-batch-size {args.micro_batch_size} "
        f"--global-batch-size {args.micro_batch_size * args.micro_batches} --lr 1e-4 --clip-grad 1.0 "
        "--eval-iters 0 --eval-interval 1000 --log-interval 1 --hidden-dropout 0 --attention-dropout 0 "
        f"--fdd-layers {args.taps} {PLAIN_MODULES} {WEIGHTS[objective]} "
    )
    if objective != "cross-entropy":
        flags += f"--teacher-load {folder / 'teacher'} "
    return (*flags.split(), *(["--bf16"] if args.bf16 else []), *rest)


def watch_all(args: argparse.Namespace, rest: list[str], folder: Path) -> dict[str, Watched]:
    """Every row of the table, one process after the other."""
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    for whose in ("teacher", "student"):
        log = folder / f"{whose}.log"
        in_own_process(make_checkpoint, folder / whose, architecture(args, whose), log, dtype)
    runs: list[tuple[str, Objective]] = [(STOCK, "cross-entropy"), *((name, name) for name in WEIGHTS)]
    watched = {}
    for number, (name, objective) in enumerate(runs):
        words = command(args, folder, objective, rest)
        log, is_stock = folder / f"run-{number}.log", name == STOCK
        repeats, is_profiled = args.repeats * measure.ATTEMPTS, args.profile is not None and not is_stock
        job = Job(words, is_stock, repeats, args.device, log, is_profiled)
        watched[name] = in_own_process(run_job, job)
        middle = statistics.median(watched[name].seconds)
        # At once: what comes after may fail.
        print(f"{name}: {middle:.3f} s, {watched[name].whole_mib:.0f} MiB", flush=True)
        print_parts(watched[name].parts, middle, args.device)
    return watched


def print_parts(parts: Mapping[str, float], step_s: float, device: str) -> None:
    """The share of each; on a GPU also how much of a step no kernel runs."""
    if not parts:
        return
    whole = sum(parts.values())
    line = ", ".join(f"{part} {value / whole:.0%}" for part, value in parts.items())
    if device == "cuda":
        line += f"; kernels {whole:.3f} s, idle {max(1 - whole / step_s, 0):.0%} of the step"
    print(f"    {line}", flush=True)


def draw_parts(args: argparse.Namespace, watched: Mapping[str, Watched], step_tokens: int) -> None:
    """The picture of --profile."""
    title = (
        f"One step of {step_tokens} tokens, {args.teacher_layers} x {args.teacher_width} -> {args.student_layers} x "
        f"{args.student_width}, vocabulary {args.vocab_size}\n{measure.machine()}; torch {torch.__version__}"
    )
    step_profile.draw({name: seen.parts for name, seen in watched.items() if seen.parts}, title, args.profile)
    print(args.profile)


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call it where nothing has been imported or allocated; an error comes back with its traceback."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def report(
    rows: Mapping[str, measure.Measurement],
    watched: Mapping[str, Watched],
    flops: Mapping[str, StepFlops],
    teacher_mib: float,
    *,
    in_fp8: bool,
) -> bool:
    """Print the table, the arithmetic and the bar; returns whether all is steady and within the bar.

    In FP8 there is no bar: a flop of the layers is a cheaper one than a flop of the losses.
    """
    print(measure.table(rows, "logit KD", "x KD"))
    print(f"\n{'':<36}{'whole MiB':>10}{'by shape':>10}{'counted':>10}  MFLOP of products per token")
    for name, seen in watched.items():
        own = flops.get(name)
        counted = "" if seen.flops is None else f"{seen.flops / 1e6:>10.1f}"
        by_shape = "" if own is None else f"{own.total / 1e6:.1f}"
        print(f"{name:<36}{seen.whole_mib:>10.0f}{by_shape:>10}{counted}")
    kd, fdd, entropy = flops["logit KD"], flops["FDD"], flops["cross-entropy"]
    in_flops = fdd.total / kd.total
    print(f"\nflops, logit KD / cross-entropy: {kd.total / entropy.total:.2f}")
    print(f"flops, FDD / logit KD:           {in_flops:.2f}")
    for other in ("cross-entropy", "logit KD"):
        extra = watched["FDD"].whole_mib - watched[other].whole_mib
        share = extra / watched[other].whole_mib
        print(f"memory, FDD less {other + ':':<16}{extra:+.0f} MiB, {share:+.0%} of the whole")
    print(f"    the teacher's weights are {teacher_mib:.0f} MiB in its checkpoint")
    if not (rows["logit KD"].is_steady and rows["FDD"].is_steady):
        print(f"missed: repeats differ by more than {measure.MAX_SPREAD:.0%}, so there is no ratio")
        return False
    ratio = rows["FDD"].seconds / rows["logit KD"].seconds
    if in_fp8:
        print(
            f"FDD / logit KD is {ratio:.2f}; layers are in FP8 and losses are not, so that flops give no bar"
        )
        return True
    passes = ratio <= BAR * in_flops
    print(
        f"{'passed' if passes else 'missed'}: FDD / logit KD is {ratio:.2f}; at most {BAR} x {in_flops:.2f} = "
        f"{BAR * in_flops:.2f} passes"
    )
    return passes


def main(argv: list[str]) -> int:
    """Returns the exit status."""
    args, rest = parse_args(argv)
    os.environ["FDD_REHEARSE"] = "1" if args.device == "cpu" else "0"  # the runs inherit it
    step_tokens = args.seq_length * args.micro_batch_size * args.micro_batches
    student, teacher = model_of(args, "student"), model_of(args, "teacher")
    flops: dict[str, StepFlops] = {
        name: step_flops(student, teacher, name, num_taps=args.taps, step_tokens=step_tokens)
        for name in WEIGHTS
    }
    with tempfile.TemporaryDirectory() as name:
        watched = watch_all(args, rest, Path(name))
        weights = (Path(name) / "teacher").rglob("*.distcp")
        teacher_mib = sum(file.stat().st_size for file in weights) / measure.MIB
    for seen in watched.values():
        seen.flops = None if seen.flops is None else seen.flops // step_tokens
    rows = {
        name: measure.first_steady(seen.seconds, args.repeats, seen.peak_mib)
        for name, seen in watched.items()
    }
    is_good = report(rows, watched, flops, teacher_mib, in_fp8=any("fp8-format" in flag for flag in rest))
    if args.profile is not None:
        draw_parts(args, watched, step_tokens)
    if args.smoke:
        return 0
    more = {
        "whole_mib": {name: round(seen.whole_mib) for name, seen in watched.items()},
        "losses": {name: seen.losses for name, seen in watched.items()},
        "parts": {name: seen.parts for name, seen in watched.items() if seen.parts},
        "flops_ratio": round(flops["FDD"].total / flops["logit KD"].total, 4),
        "megatron_flags": rest,
    }
    size = {name: value for name, value in vars(args).items() if name != "profile"}
    measure.record("step", size, rows, **more)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
