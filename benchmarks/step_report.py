"""The figures of the step benchmark: a row as it comes, and the table with the bar at the end."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benchmarks import lines, measure, step_profile
from benchmarks.step_command import modules
from benchmarks.step_flops import StepFlops
from benchmarks.step_run import Watched

# The ratio of FDD to logit KD in time may exceed the ratio in flops by this factor.
BAR = 1.05


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


def report(
    rows: Mapping[str, measure.Measurement],
    watched: Mapping[str, Watched],
    flops: Mapping[str, StepFlops],
    teacher_mib: float,
    *,
    in_fp8: bool,
    in_turns: bool,
) -> bool:
    """Print the table, the arithmetic and the bar; return whether all rows are steady and within the bar.

    By turns the time's ratio is the median of the rounds' ratios, and half of them must be near it.
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
    if in_turns:
        low, ratio, high = round_ratios(watched["FDD"].seconds, watched["logit KD"].seconds)
        is_steady = high - low <= measure.MAX_SPREAD * ratio
        print(
            f"time, FDD / logit KD by turns:   {ratio:.3f}, half of the rounds within {low:.3f} to {high:.3f}"
        )
    else:
        ratio = rows["FDD"].seconds / rows["logit KD"].seconds
        is_steady = rows["logit KD"].is_steady and rows["FDD"].is_steady
    if not is_steady:
        print(f"missed: repeats differ by more than {measure.MAX_SPREAD:.0%}, so there is no ratio")
        return False
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


def round_ratios(times: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile of the rounds' ratios."""
    ratios = [own / other for own, other in zip(times, others, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return low, middle, high
