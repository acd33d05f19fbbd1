"""A whole Megatron step of ours, through the real entry point: FDD, then plain logit distillation.

    python -m benchmarks.step                # on one CPU thread, minutes
    python -m benchmarks.step --device cuda --bf16    # undivided, 8 x 1,024 tokens
    python -m benchmarks.step --cross-entropy         # and cross-entropy: ours, and stock Megatron's
    python -m benchmarks.step --turns --repeats 20    # a step of FDD, a step of logit KD, and so on
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
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

# One thread: times of several do not repeat on a shared machine. Set before torch is imported, here and in the runs.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import torch

from benchmarks import measure
from benchmarks.step_command import SIZES, SMOKE, WEIGHTS, architecture, command, model_of
from benchmarks.step_flops import Objective, StepFlops, step_flops
from benchmarks.step_report import draw_parts, report, tell
from benchmarks.step_run import Job, Watched, make_checkpoint, run_job

IMAGE = "benchmarks.step_image"
STOCK = "cross-entropy, stock Megatron"

type Show = Callable[[str, Watched], None]


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
    parser.add_argument(
        "--turns",
        action="store_true",
        help="run all at once, each step while the others wait, in place of one after the other: ratios of rounds,\n"
        "which a machine that changes its pace hardly changes; takes the memory of all",
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
    if args.turns and (args.budget_s or args.repeats < 2):
        parser.error("--turns: give --repeats of 2 or more, and no --budget-s")
    args.parts |= args.profile is not None
    return args, rest


def watch_all(
    args: argparse.Namespace, rest: list[str], folder: Path, flops: Mapping[str, StepFlops]
) -> dict[str, Watched]:
    """Run every row of the table in its own process; leave out what fails or does not fit into the time."""
    with contextlib.ExitStack() as stack:
        # All start at once, so that their imports, most of a short run, are done when their turn comes.
        jobs = jobs_of(args, rest, folder, stack)
        pools = [stack.enter_context(new_process(args.device)) for _ in range(2 + len(jobs))]
        dtype = torch.bfloat16 if args.bf16 else torch.float32
        for whose, pool in zip(("teacher", "student"), pools, strict=False):
            given = (folder / whose, architecture(args, whose), folder / f"{whose}.log", dtype)
            in_own_process(pool, make_checkpoint, *given)
        own_pools = dict(zip(jobs, pools[2:], strict=True))

        def show(name: str, seen: Watched) -> None:
            tell(args, rest, name, seen, flops.get(name))

        if args.turns:
            return watch_in_turns(jobs, own_pools, show)
        return watch_in_sequence(jobs, own_pools, show, args.budget_s)


def jobs_of(
    args: argparse.Namespace, rest: list[str], folder: Path, stack: contextlib.ExitStack
) -> dict[str, Job]:
    """Return the run of every row, the one first that is most worth knowing."""
    runs: list[tuple[str, Objective]] = [("FDD", "FDD"), ("logit KD", "logit KD")]
    runs += [("cross-entropy", "cross-entropy"), (STOCK, "cross-entropy")] * args.cross_entropy
    repeats = args.repeats * (1 if args.budget_s or args.turns else measure.ATTEMPTS)
    turns = stack.enter_context(multiprocessing.Manager()).Barrier(len(runs)) if args.turns else None
    jobs = {}
    for number, (name, objective) in enumerate(runs):
        words, is_stock = command(args, folder, objective, rest), name == STOCK
        log = folder / f"run-{number}.log"
        is_profiled = args.parts and not is_stock
        jobs[name] = Job(words, is_stock, repeats, args.device, log, is_profiled, turns, number)
    return jobs


def watch_in_sequence(
    jobs: Mapping[str, Job], pools: Mapping[str, Any], show: Show, budget_s: float | None
) -> dict[str, Watched]:
    """Run one job after the other; begin none that would take longer than what is left."""
    deadline = time.monotonic() + (budget_s or float("inf"))
    watched: dict[str, Watched] = {}
    took_s = 0.0
    for name, job in jobs.items():
        if (left_s := deadline - time.monotonic()) < took_s:
            print(
                f"{name}: not begun: {left_s:.0f} s are left and the last run took {took_s:.0f} s", flush=True
            )
            break
        started = time.monotonic()
        try:
            watched[name] = in_own_process(pools[name], run_job, job)
        except Exception as error:  # whatever went wrong, the next run may work
            print_failure(name, error)
            continue
        took_s = time.monotonic() - started
        show(name, watched[name])
    return watched


def watch_in_turns(jobs: Mapping[str, Job], pools: Mapping[str, Any], show: Show) -> dict[str, Watched]:
    """Run all jobs at once; where one fails, none goes on."""

    def run(name: str) -> Watched | None:
        try:
            return in_own_process(pools[name], run_job, jobs[name])
        except Exception as error:
            if not (turns := jobs[name].turns).broken:
                turns.abort()
                print_failure(name, error)
            return None

    with ThreadPoolExecutor(len(jobs)) as threads:
        results = dict(zip(jobs, threads.map(run, jobs), strict=True))
    watched = {name: seen for name, seen in results.items() if seen is not None}
    for name, seen in watched.items():
        show(name, seen)
    return watched


def print_failure(name: str, error: Exception) -> None:
    """Print why a run failed, with the traceback of its own process."""
    print(f"{name}: {error}\n{error.__cause__ or ''}", file=sys.stderr, flush=True)


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
    in_fp8 = any("fp8-format" in flag for flag in rest)
    is_good = report(rows, watched, flops, teacher_mib, in_fp8=in_fp8, in_turns=args.turns)
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
