"""A whole Megatron step of ours, through the real entry point: FDD, then plain logit distillation.

    python -m benchmarks.step                # on one CPU thread, minutes
    python -m benchmarks.step --device cuda --bf16    # undivided, 8 x 1,024 tokens
    python -m benchmarks.step --cross-entropy         # and cross-entropy: ours, and stock Megatron's
    python -m benchmarks.step --profile docs/step-profile.png    # profile one more step, and draw where its time goes
    python -m benchmarks.step --smoke        # seconds; its figures mean nothing

The default shape is GPT-2 XL -> GPT-2 0.1B (the paper's hardest: a small student with a large vocabulary), on a CPU
with widths and vocabulary divided by four and all layers kept, which leaves the ratios of its flops as they are.
Weights are random, the data made up. "logit KD" is our own entry point with the weights of trajectory and delta at 0,
hence fused already; "stock Megatron" has no part of our objective, and a [tokens, vocabulary] tensor. On a GPU the
modules are TransformerEngine's if it is installed. Flags that are not listed here are passed on to Megatron.

Exit status 1: a run failed, a measurement was too unsteady for a ratio, or FDD costs more than the bar.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

# One thread: times of several do not repeat on a shared machine. Set before torch is imported, here and in the runs.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import torch

from benchmarks import lines, measure, step_profile
from benchmarks.step_command import SIZES, SMOKE, WEIGHTS, architecture, command, model_of, modules
from benchmarks.step_flops import Objective, StepFlops, step_flops
from benchmarks.step_run import Job, Watched, make_checkpoint, run_job

# The ratio of FDD to logit KD in time may exceed the ratio in flops by this factor.
BAR = 1.05
IMAGE = "benchmarks.step_image"
STOCK = "cross-entropy, stock Megatron"


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return our arguments, and the remaining words for Megatron."""
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
        "--cross-entropy", action="store_true", help="and cross-entropy, ours and stock Megatron's"
    )
    parser.add_argument("--parts", action="store_true", help="of one more step, under torch's profiler")
    parser.add_argument("--profile", type=Path, metavar="PNG", help="draw that")
    parser.add_argument("--lines", type=Path, metavar="FILE", help="add a line of JSON for each row to it")
    parser.add_argument(
        "--models", type=Path, metavar="DIR", help="keep the models there, or take them from there"
    )
    parser.add_argument(
        "--budget-s",
        type=float,
        help="seconds after which no run is begun that would take as long as the one before it; each has one set\n"
        "of repeats, steady or not",
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
    args.parts |= args.profile is not None
    return args, rest


def watch_all(
    args: argparse.Namespace, rest: list[str], folder: Path, flops: Mapping[str, StepFlops]
) -> dict[str, Watched]:
    """Run every row of the table, one process after the other; leave out what fails or does not fit into the time."""
    deadline = time.monotonic() + (args.budget_s or float("inf"))
    runs: list[tuple[str, Objective]] = [("FDD", "FDD"), ("logit KD", "logit KD")]
    runs += [("cross-entropy", "cross-entropy"), (STOCK, "cross-entropy")] * args.cross_entropy
    watched: dict[str, Watched] = {}
    with contextlib.ExitStack() as stack:
        # All start at once, so that their imports, most of a short run, are done when their turn comes.
        pools = iter([stack.enter_context(new_process(args.device)) for _ in range(2 + len(runs))])
        dtype = torch.bfloat16 if args.bf16 else torch.float32
        for whose in ("teacher", "student"):
            given = (folder / whose, architecture(args, whose), folder / f"{whose}.log", dtype)
            in_own_process(next(pools), make_checkpoint, *given)
        took_s = 0.0
        for number, (name, objective) in enumerate(runs):
            if (left_s := deadline - time.monotonic()) < took_s:
                print(
                    f"{name}: not begun: {left_s:.0f} s are left and the last run took {took_s:.0f} s",
                    flush=True,
                )
                break
            started = time.monotonic()
            repeats = args.repeats * (1 if args.budget_s else measure.ATTEMPTS)
            words, is_stock = command(args, folder, objective, rest), name == STOCK
            log = folder / f"run-{number}.log"
            job = Job(words, is_stock, repeats, args.device, log, args.parts and not is_stock)
            try:
                watched[name] = in_own_process(next(pools), run_job, job)
            except Exception as error:  # whatever went wrong, the next run may work
                print(f"{name}: {error}\n{error.__cause__ or ''}", file=sys.stderr, flush=True)
                continue
            took_s = time.monotonic() - started
            tell(args, rest, name, watched[name], flops.get(name))
    return watched


def tell(args: argparse.Namespace, rest: list[str], name: str, seen: Watched, own: StepFlops | None) -> None:
    """Print a row and add its line at once, because a later row may fail."""
    middle = statistics.median(seen.seconds)
    losses = ", ".join(f"{term} {value:.6g}" for term, value in seen.losses.items())
    print(f"{name}: {middle:.3f} s, {seen.whole_mib:.0f} MiB; {losses}", flush=True)
    print_parts(seen.parts, middle, args.device)
    row = measure.first_steady(seen.seconds, args.repeats, seen.peak_mib)
    size = {key: value for key, value in vars(args).items() if not isinstance(value, Path)}
    flags = " ".join([modules(args.device), *["--bf16"] * args.bf16, *rest])
    record = {"objective": name, "flags": flags, "size": size, "seconds": row.seconds}
    record |= {
        "spread": round(row.spread, 4),
        "peak_mib": round(row.peak_mib),
        "whole_mib": round(seen.whole_mib),
    }
    record |= {"losses": seen.losses, "parts": seen.parts, "flop_by_shape": own and own.total}
    lines.write(args.lines, "step", measure.origin() | {"device": args.device} | record)


def print_parts(parts: Mapping[str, float], step_s: float, device: str) -> None:
    """Print the share of each part; on a GPU also the share of a step in which no kernel runs."""
    if not parts:
        return
    whole = sum(parts.values())
    line = ", ".join(f"{part} {value / whole:.0%}" for part, value in parts.items())
    if device == "cuda":
        line += f"; kernels {whole:.3f} s, idle {max(1 - whole / step_s, 0):.0%} of the step"
    print(f"    {line}", flush=True)


def draw_parts(args: argparse.Namespace, watched: Mapping[str, Watched], step_tokens: int) -> None:
    """Draw the picture of --profile."""
    title = (
        f"One step of {step_tokens} tokens, {args.teacher_layers} x {args.teacher_width} -> {args.student_layers} x "
        f"{args.student_width}, vocabulary {args.vocab_size}\n{measure.machine()}; torch {torch.__version__}"
    )
    step_profile.draw({name: seen.parts for name, seen in watched.items() if seen.parts}, title, args.profile)
    print(args.profile)


def new_process(device: str) -> ProcessPoolExecutor:
    """Return a process that has imported Megatron when its work comes, and has allocated nothing.

    It is a copy of a server that has imported it; on a GPU, whose context no process may inherit, it imports by
    itself.
    """
    context = multiprocessing.get_context("spawn" if device == "cuda" else "forkserver")
    if device == "cpu":
        context.set_forkserver_preload([IMAGE])
    pool = ProcessPoolExecutor(1, context)
    pool.submit(importlib.import_module, IMAGE)
    return pool


def in_own_process(pool: ProcessPoolExecutor, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process, and end the process; an error comes back with its traceback."""
    with pool:
        return pool.submit(function, *arguments).result()


def report(
    rows: Mapping[str, measure.Measurement],
    watched: Mapping[str, Watched],
    flops: Mapping[str, StepFlops],
    teacher_mib: float,
    *,
    in_fp8: bool,
) -> bool:
    """Print the table, the arithmetic and the bar; return whether all rows are steady and within the bar.

    In FP8 there is no bar: a flop of the layers is cheaper than a flop of the losses.
    """
    if not {"logit KD", "FDD"} <= set(rows):
        print("missed: FDD and logit KD have not both ended, so there is no ratio")
        return False
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
    for other in [name for name in ("cross-entropy", "logit KD") if name in watched]:
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
    """Measure; return the exit status."""
    args, rest = parse_args(argv)
    os.environ["FDD_REHEARSE"] = "1" if args.device == "cpu" else "0"  # the runs inherit it
    step_tokens = args.seq_length * args.micro_batch_size * args.micro_batches
    student, teacher = model_of(args, "student"), model_of(args, "teacher")
    flops: dict[str, StepFlops] = {
        name: step_flops(
            student, teacher, name, num_taps=args.taps, step_tokens=step_tokens, on_gpu=args.device == "cuda"
        )
        for name in WEIGHTS
    }
    with tempfile.TemporaryDirectory() as name:
        folder = args.models or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        watched = watch_all(args, rest, folder, flops)
        weights = (folder / "teacher").rglob("*.distcp")
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
        return 0 if {"FDD", "logit KD"} <= set(watched) else 1
    if args.lines is not None:
        return 0 if is_good else 1
    more = {
        "whole_mib": {name: round(seen.whole_mib) for name, seen in watched.items()},
        "losses": {name: seen.losses for name, seen in watched.items()},
        "parts": {name: seen.parts for name, seen in watched.items() if seen.parts},
        "flops_ratio": round(flops["FDD"].total / flops["logit KD"].total, 4),
        "megatron_flags": rest,
    }
    size = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
    measure.record("step", size, rows, **more)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
