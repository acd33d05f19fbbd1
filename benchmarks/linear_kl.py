"""Time and memory of the losses: plain torch, ours, Liger's fused loss, and the bare matrix products as the floor.

    python -m benchmarks.linear_kl                     # the size that the bars are for
    python -m benchmarks.linear_kl --sweep             # over tokens, widths and vocabularies

Forward KL, log-probability delta, forward and backward. Two comparisons: the whole objective of K sampled layers
(trajectory and delta, heads constant, Gram matrices included) and the final logits alone (head trained). Every
implementation runs in a process of its own, on one CPU thread (on a GPU: `benchmarks.interleaved`); before it is
measured its loss is compared with float64. Exits 1 when repeats differ too much for a ratio, or a bar is missed.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial

import torch

from benchmarks.linear_kl_steps import (
    Size,
    Step,
    bare_final,
    bare_products,
    bare_tap,
    exact,
    liger_final,
    our_final,
    our_final_per_token,
    our_objective,
    our_tap,
    plain_final,
    plain_objective,
)
from benchmarks.measure import MIB, Measurement, machine, measure, record, table
from megatron_fdd.ops.implementation import Implementation

Maker = Callable[[Size], Step]
FLOOR, PLAIN, OURS = "bare matrix products", "plain torch", "megatron_fdd"
PER_TOKEN, LIGER = "megatron_fdd, gradient per token", "Liger LigerFusedLinearJSDLoss"
IN_TRAINING = "megatron_fdd, into main_grad"
# The bars at the default size.
OBJECTIVE_BAR, PLAIN_BAR, VOCAB_BAR = 1.25, 0.75, 0.05

DEFAULT = Size(1024, 32000, 768, 384, 4)
SMOKE = Size(64, 500, 24, 16, 2)


def check(makers: dict[str, Maker], size: Size, *, whole: bool) -> None:
    """Check each implementation's loss against float64, at few tokens and a small vocabulary."""
    small = replace(size, tokens=min(size.tokens, 64), vocab=min(size.vocab, 4000))
    wanted = exact(small, whole=whole)
    for name, make in makers.items():
        if name == FLOOR:
            continue
        found = make(small)().item()
        tolerance = 1e-5 if size.dtype == "float32" else 2e-2
        if abs(found - wanted) > tolerance * abs(wanted):
            raise SystemExit(f"{name} gives {found}, float64 gives {wanted}: not the same work")


def compare(title: str, makers: dict[str, Maker], size: Size, repeats: int) -> dict[str, Measurement]:
    """Measure, print and, unless this is a trial, record."""
    rows: dict[str, Measurement] = {}
    for name, make in makers.items():
        try:
            rows[name] = measure(partial(make, size), repeats)
        except RuntimeError as error:
            print(f"{name}: {error}", file=sys.stderr)
    print(f"\n{title}\n{table(rows, FLOOR)}", flush=True)
    if size != SMOKE:
        record(title, asdict(size), rows)
    return rows


def bars(size: Size, objective: dict[str, Measurement], final: dict[str, Measurement], repeats: int) -> bool:
    """Print the bars at the default size and what was measured; return whether all of them hold."""
    if not all(row.is_steady for row in [*objective.values(), *final.values()]):
        return False
    floor, ours = objective[FLOOR], objective[OURS]
    tile = Implementation().tile_columns(torch.empty(0, dtype=getattr(torch, size.dtype)), None)
    wide, width = size.teacher_width, size.student_width
    grams = wide * wide + wide * width + width * width
    allowed = 1.02 * 4 * (3 * size.tokens * tile + 2 * size.layers * size.tokens * width + grams) / MIB
    doubled = measure(partial(our_objective, replace(size, vocab=2 * size.vocab)), repeats)
    growth = abs(doubled.peak_mib / ours.peak_mib - 1)
    found = [
        (f"objective / bare products at most {OBJECTIVE_BAR}", ours.seconds / floor.seconds, OBJECTIVE_BAR),
        (f"objective's extra MiB at most {allowed:.0f}", ours.peak_mib, allowed),
        ("its growth with twice the vocabulary at most 5 %", growth, VOCAB_BAR),
    ]
    if PLAIN in objective:
        ratio = ours.seconds / objective[PLAIN].seconds
        found.append((f"objective / plain torch at most {PLAIN_BAR}", ratio, PLAIN_BAR))
    if LIGER in final:
        found.append(("final logits / Liger at most 1", final[OURS].seconds / final[LIGER].seconds, 1.0))
        ratio = final[OURS].peak_mib / final[LIGER].peak_mib
        found.append(("their extra memory / Liger's at most 1", ratio, 1.0))
    print()
    for text, value, bar in found:
        print(f"{'passed' if value <= bar else 'MISSED'}: {text}: {value:.3f}")
    return all(value <= bar for _, value, bar in found)


def sizes(base: Size) -> list[Size]:
    """Return the default and sizes that differ from it in one thing each."""
    changes: list[dict[str, int]] = [{"vocab": 128000}, {"vocab": 152000}]
    changes += [{"tokens": base.tokens // 4}, {"tokens": 2 * base.tokens}]
    changes += [{"teacher_width": 2 * base.teacher_width, "student_width": 2 * base.student_width}]
    return [size for size in (replace(base, **change) for change in changes) if size != base]


def main(argv: list[str]) -> int:
    """Measure the losses; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("tokens", "vocab", "teacher_width", "student_width", "layers"):
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, help=f"{name} ({getattr(DEFAULT, name)})"
        )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=5, help="of which the median counts (%(default)s)")
    parser.add_argument("--smoke", action="store_true", help="a tiny size, and nothing is recorded")
    parser.add_argument("--sweep", action="store_true", help="over tokens, widths and vocabularies")
    parser.add_argument(
        "--no-plain", action="store_true", help="leave out plain torch, which needs the memory"
    )
    args = parser.parse_args(argv)
    given = {name: value for name in asdict(DEFAULT) if (value := getattr(args, name, None)) is not None}
    base = SMOKE if args.smoke else replace(DEFAULT, **given)
    print(f"{machine()}; torch {torch.__version__}; median of {args.repeats}")
    objective: dict[str, Maker] = {
        FLOOR: bare_products,
        PLAIN: plain_objective,
        OURS: our_objective,
    }
    final: dict[str, Maker] = {
        FLOOR: bare_final,
        PLAIN: plain_final,
        OURS: our_final,
        IN_TRAINING: partial(our_final, trains=True),
        PER_TOKEN: our_final_per_token,
    }
    if importlib.util.find_spec("liger_kernel") is None:
        print("liger_kernel is not installed: left out (pip install liger-kernel)")
    else:
        final[LIGER] = liger_final
    if args.no_plain:
        del objective[PLAIN], final[PLAIN]
    tap: dict[str, Maker] = {FLOOR: bare_tap, OURS: our_tap}
    check(objective, base, whole=True)
    check(final, base, whole=False)
    check(tap, base, whole=False)
    good = True
    for size in sizes(base) if args.sweep else [base]:
        print(f"\n{size}")
        one = compare("one layer's divergence, heads constant", tap, size, args.repeats)
        whole = compare(f"objective, {size.layers} layers, heads constant", objective, size, args.repeats)
        alone = compare("final logits, head trained", final, size, args.repeats)
        steady = all(row.is_steady for row in [*one.values(), *whole.values(), *alone.values()])
        if not steady:
            print("repeats differ by more than 5 %: too much noise for a ratio", file=sys.stderr)
        good &= steady
        if size == DEFAULT and not args.sweep:
            good &= bars(size, whole, alone, args.repeats)
    return 0 if good or args.smoke else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
