"""A stored teacher: how fast and in how much memory `fdd teach` makes its features, and what a step with them costs.

    python -m benchmarks.teacher_store              # all four parts on two quiet cores
    python -m benchmarks.teacher_store megatron     # one of them: megatron, transformers, memory, step
    python -m benchmarks.teacher_store --smoke      # that it runs; its figures mean nothing

megatron, transformers: the real `fdd teach` with that engine, in bf16, a sequence a batch. Blocks of batches through
its loop (ids, teacher, packing, copies, and the writing beside it) take turns with blocks of batches through the
teacher's layers alone. Goal: 0.90 of their tokens a second.
memory: the most that `fdd teach` holds beyond its model, for a small and a large store. Goal: it does not grow.
step: a real training with `--fdd-teacher-store`. Blocks of steps with the store (workers read, the step unpacks and
norms) take turns with blocks whose features lie in memory as the losses take them. Goal: 1.02 of their time.

The default teacher has SmolLM2-135M's shape and the student half its layers; weights are random, and so is the text,
for neither changes the time. One thread for the models; the producer's writing and the loader's workers use another
core. Times are wall times, so that waiting counts; the medians of ratios of neighbouring blocks are what is compared.
Exits 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

# One thread: set before torch is imported, here and in the runs.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

from benchmarks import lines
from benchmarks.measure import MIB, RESULTS, origin
from benchmarks.step import in_own_process, new_process
from benchmarks.teacher_store_run import (
    Held,
    Job,
    make_inputs,
    run_producer,
    run_step,
    watch_memory,
)
from benchmarks.teacher_store_turns import Alternation

PARTS = ("megatron", "transformers", "memory", "step")
# The goals.
PRODUCER, STEP, GROWTH = 0.90, 1.02, 1.05
SHAPE = {
    "layers": 30, "width": 576, "heads": 9, "groups": 3, "ffn": 1536, "vocab_size": 49152, "student_layers": 15,
    "seq_length": 512, "taps": 4, "count": 50, "block": 5, "units": (100, 400),
}  # fmt: skip
SMOKE = {
    "layers": 4, "width": 48, "heads": 3, "groups": 3, "ffn": 64, "vocab_size": 199, "student_layers": 3,
    "seq_length": 32, "taps": 2, "count": 4, "block": 2, "units": (8, 16),
}  # fmt: skip


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Return the arguments, with the shape of the models among them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.teacher_store",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="what is measured (all of it)")
    parser.add_argument(
        "--teacher-hf", type=Path, metavar="DIR", help="a teacher of that shape in place of random weights"
    )
    parser.add_argument("--folder", type=Path, help="keep models and stores there, or take them from there")
    parser.add_argument("--count", type=int, help="batches, or steps, of either kind (50)")
    parser.add_argument("--taps", type=int, help="K, sampled layers of the step (4)")
    parser.add_argument("--float32", action="store_true", help="both models in float32, in place of bf16")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, and nothing is recorded")
    args = parser.parse_args(argv)
    shape = SMOKE if args.smoke else SHAPE
    vars(args).update({name: value for name, value in shape.items() if getattr(args, name, None) is None})
    args.parts = args.parts or list(PARTS)
    return args


def data_flags(args: argparse.Namespace, folder: Path, num_samples: int) -> list[str]:
    """Return a training's flags about its data, a sequence a step."""
    return (
        f"--train-data-path {folder / 'text'} --seq-length {args.seq_length} --global-batch-size 1 "
        f"--train-iters {num_samples} --eval-interval 100000 --eval-iters 0 --seed 1 "
        f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {folder / 'teacher-hf'}"
    ).split()


def teach_flags(args: argparse.Namespace, folder: Path, engine: str, store: str, count: int) -> list[str]:
    """Return the words behind `fdd teach`, with a sequence a batch."""
    teacher, more = folder / "teacher", ["--bf16"] * (not args.float32)
    if engine == "transformers":
        teacher, more = folder / "teacher-hf", ["--device-map", "cpu"]
    form = "float32" if args.float32 else "bf16"
    own = f"--engine {engine} --teacher {teacher} --store {folder / store} --form {form} --fdd-layers {args.taps}"
    return [
        *own.split(),
        *("--batch-tokens", str(args.seq_length)),
        *more,
        *data_flags(args, folder, count),
    ]


def measure_producer(args: argparse.Namespace, folder: Path, engine: str) -> tuple[dict[str, Any], bool]:
    """Measure `fdd teach` against the bare forward pass; return figures, and whether the goal is met."""
    store = f"store-{engine}"
    shutil.rmtree(folder / store, ignore_errors=True)
    words = teach_flags(args, folder, engine, store, args.count)
    job = Job(words, folder / f"{engine}.log", args.block, args.count)
    seen: Alternation = in_own_process(new_process("cpu"), run_producer, job)
    rates = {
        name: args.block * args.seq_length / statistics.median(values)
        for name, values in (("fdd teach", seen.ours), ("forward", seen.bare))
    }
    ratios = [bare / ours for ours, bare in zip(seen.ours, seen.bare, strict=True)]
    whole = sum(seen.bare) / sum(seen.ours)
    print(
        f"{engine}: {rates['fdd teach']:.0f} tokens/s; the bare forward pass {rates['forward']:.0f}; "
        f"{statistics.median(ratios):.3f} of it ({min(ratios):.3f} to {max(ratios):.3f} by block, {whole:.3f} of the "
        f"whole with the last segment's writing)",
        flush=True,
    )
    print_parts(seen.parts)
    return {"ratio": statistics.median(ratios), "whole": whole, **asdict(seen)}, min(
        statistics.median(ratios), whole
    ) >= PRODUCER


def print_parts(parts: Mapping[str, float]) -> None:
    """Print seconds of what is inside the loop of a producer."""
    print("    " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in parts.items()), flush=True)


def measure_memory(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], bool]:
    """Measure the memory of `fdd teach` for two sizes of store; return figures, and whether it does not grow."""
    found: dict[str, Held] = {}
    for count in args.units:
        words = teach_flags(args, folder / "memory", "megatron", f"store-{count}", count)
        shutil.rmtree(folder / f"memory/store-{count}", ignore_errors=True)
        job = Job(words, folder / f"memory-{count}.log", args.block, count)
        held: Held = in_own_process(new_process("cpu"), watch_memory, job)
        found[str(count)] = held
        print(
            f"memory, {count} units, {held.store_bytes / MIB:.0f} MiB: {held.most_bytes / MIB:.0f} MiB beyond the "
            f"model's {held.before_bytes / MIB:.0f}; a batch has {held.batch_bytes / MIB:.1f} MiB of features, the "
            f"largest segment {held.segment_bytes / MIB:.0f}",
            flush=True,
        )
    small, large = (found[str(count)].most_bytes for count in args.units)
    return {name: asdict(held) for name, held in found.items()}, large <= GROWTH * small


def measure_step(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], bool]:
    """Measure a step with a store against one with features in memory; return figures, and whether the goal is met."""
    steps = 2 * args.count + 2 * args.block  # the first blocks warm up
    store = "store-step"
    in_own_process(
        new_process("cpu"),
        watch_memory,
        Job(
            teach_flags(args, folder, "megatron", store, steps), folder / "teach-step.log", args.block, steps
        ),
    )
    words = [
        *f"--pretrained-checkpoint {folder / 'student'} --use-checkpoint-args --micro-batch-size 1".split(),
        *f"--fdd-teacher-store {folder / store} --fdd-layers {args.taps} --lr 1e-5 --log-interval 1000".split(),
        *f"--hidden-dropout 0 --attention-dropout 0 --fdd-metrics-file {folder / 'metrics.jsonl'}".split(),
        *(["--bf16"] * (not args.float32)),
        *data_flags(args, folder, steps),
    ]
    seen: Alternation = in_own_process(
        new_process("cpu"), run_step, Job(words, folder / "step.log", args.block, steps)
    )
    size = args.block
    blocks = [
        (statistics.median(seen.ours[at : at + size]), statistics.median(seen.bare[at : at + size]))
        for at in range(0, len(seen.ours), size)
    ]
    ratios = [ours / bare for ours, bare in blocks]
    middle = {"with a store": statistics.median(seen.ours), "in memory": statistics.median(seen.bare)}
    ratio = middle["with a store"] / middle["in memory"]
    print(
        f"step: {middle['with a store']:.3f} s with a store, {middle['in memory']:.3f} s with features in memory "
        f"(medians of {len(seen.ours)}): {ratio:.4f}; by block {min(ratios):.4f} to {max(ratios):.4f}, median "
        f"{statistics.median(ratios):.4f}; waited for data {statistics.median(seen.waits) * 1e3:.2f} ms a step",
        flush=True,
    )
    return {"ratio": ratio, "by_block": statistics.median(ratios), **asdict(seen)}, ratio <= STEP


def main(argv: Sequence[str]) -> int:
    """Measure and print; return the exit status."""
    args = parse_args(argv)
    os.environ["FDD_REHEARSE"] = "1"  # the runs inherit it
    found: dict[str, Any] = {}
    is_met: dict[str, bool] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = args.folder or Path(name)
        in_own_process(new_process("cpu"), make_inputs, vars(args), folder, folder / "inputs.log")
        if "memory" in args.parts:
            # What is held beyond the model does not depend on its depth.
            small = {**vars(args), "layers": args.taps + 1, "student_layers": 1, "teacher_hf": None}
            in_own_process(new_process("cpu"), make_inputs, small, folder / "memory", folder / "inputs.log")
        for part in args.parts:
            if part == "memory":
                found[part], is_met[part] = measure_memory(args, folder)
            elif part == "step":
                found[part], is_met[part] = measure_step(args, folder)
            else:
                found[part], is_met[part] = measure_producer(args, folder, part)
            if not args.smoke:
                size = {key: value for key, value in vars(args).items() if not isinstance(value, Path)}
                lines.write(
                    RESULTS,
                    "benchmark",
                    {**origin(), "benchmark": f"teacher_store {part}", "size": size, "rows": found[part]},
                )
    if args.smoke:
        return 0
    for part, good in is_met.items():
        print(f"{part}: {'met' if good else 'missed'}")
    return 0 if all(is_met.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
