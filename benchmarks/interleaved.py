"""The losses on a GPU, each beside its bare matrix products: one process, the variants of a group in turn, A B A B.

    python -m benchmarks.interleaved --device cuda --lines runs/gpu/results.jsonl
    python -m benchmarks.interleaved --only delta "final logits"        # only these groups; here at a toy size

A GPU's clock drifts by some 10 % within minutes. So two figures that are compared are never taken one after the
other: every round calls each variant of a group once, and a ratio is the median of the rounds' ratios. On a GPU the
time is device time, else process CPU time at a toy size, whose figures mean nothing. The groups run in the order of
their importance. The lines of a group are in the file as soon as it ends, and a later call with the same file
leaves out what is there. `python -m benchmarks.tables FILE` makes tables of them. A new variant is a line in
`benchmarks/loss_groups.py`.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import lines, measure
from benchmarks.loss_groups import SCALES, Group, Scale, groups, square


@dataclass(frozen=True, slots=True)
class Taken:
    """The results of a group's rounds.

    For each row: the seconds of each round, the peak memory, or the error that ended it.
    """

    seconds: dict[str, list[float]]
    peak_mib: dict[str, float]
    errors: dict[str, str]


def take_turns(group: Group, rounds: int, device: str) -> Taken:
    """Call every variant once to warm up, once for its memory, then once in each round; leave out one that fails."""
    timed = measure.device_seconds if device == "cuda" else measure.cpu_seconds
    taken, ready = Taken({}, {}, {}), {}
    for variant in group.variants:
        try:
            step = variant.make()
            step()
            taken.peak_mib[variant.row] = measure.peak_of(step, device)
            ready[variant.row], taken.seconds[variant.row] = step, []
        except (RuntimeError, ImportError) as error:
            taken.errors[variant.row] = f"{type(error).__name__}: {error}".splitlines()[0]
    for _ in range(rounds):
        for row, step in ready.items():
            taken.seconds[row].append(timed(step))
    return taken


def rows_of(group: Group, taken: Taken, device: str) -> list[dict[str, Any]]:
    """Return a record for each variant."""
    found = []
    for variant in group.variants:
        record: dict[str, Any] = {"group": group.name, "row": variant.row, "size": asdict(variant.size)}
        times = taken.seconds.get(variant.row)
        if times is None:
            found.append(record | {"error": taken.errors[variant.row]})
            continue
        seen = measure.summary(times, taken.peak_mib[variant.row])
        record |= {"seconds": seen.seconds, "spread": round(seen.spread, 4), "rounds": len(times)}
        record["peak_mib"] = round(seen.peak_mib, 1)
        base = taken.seconds.get(variant.floor or "")
        if base is not None:
            ratios = [own / other for own, other in zip(times, base, strict=True)]
            record |= {"floor": variant.floor, "ratio": round(statistics.median(ratios), 4)}
            record["ratio_spread"] = round(max(ratios) - min(ratios), 4)
        if variant.work is not None:
            record |= {"rate": variant.work / seen.seconds, "unit": variant.unit}
        found.append(record)
    return found


def show(record: dict[str, Any]) -> None:
    """Print a record."""
    if "error" in record:
        print(f"    {record['row']:<58} {record['error']}", flush=True)
        return
    ratio = f"{record['ratio']:>6.2f} x floor" if "ratio" in record else " " * 14
    rate = f"  {record['rate']:.3g} {record['unit']}" if "rate" in record else ""
    text = f"    {record['row']:<58} {1000 * record['seconds']:>9.3f} ms {ratio} {record['peak_mib']:>8.0f} MiB{rate}"
    print(text, flush=True)


def warm_up(scale: Scale) -> None:
    """Warm up once in the process, until the GPU's clock has come down to what its power allows for long."""
    step = square(scale.size, scale.square)
    started = time.perf_counter()
    while time.perf_counter() - started < measure.WARM_UP_S:
        for _ in range(50):
            step()
        torch.cuda.synchronize()


def main(argv: Sequence[str]) -> int:
    """Measure the groups; return the exit status, 1 if a variant failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.interleaved",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=SCALES, default="cpu", help="(%(default)s)")
    parser.add_argument("--lines", type=Path, metavar="FILE", help="add a line of JSON for each row to it")
    parser.add_argument("--rounds", type=int, help="(the device's default)")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="the groups alone whose names begin so")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    torch.set_num_threads(1)
    scale = SCALES[args.device]
    print(f"{measure.machine()}; {measure.versions()}; {args.rounds or scale.rounds} rounds", flush=True)
    before = lines.read(args.lines, "loss") if args.lines else []
    there = {(line["group"], line["row"]) for line in before if line["device"] == args.device}
    if args.device == "cuda":
        warm_up(scale)
    is_good = True
    for group in groups(scale):
        if args.only and not group.name.startswith(tuple(args.only)):
            continue
        if all((group.name, variant.row) in there for variant in group.variants):
            continue
        taken = take_turns(group, args.rounds or scale.rounds, args.device)
        records = rows_of(group, taken, args.device)
        lines.write(
            args.lines, "loss", *(measure.origin() | {"device": args.device} | record for record in records)
        )
        print(group.name, flush=True)
        for record in records:
            show(record)
        is_good &= not taken.errors
        del taken
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
