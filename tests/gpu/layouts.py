"""Steps of toy models at several layouts, compared with the float64 oracle, over NCCL (with --device cpu over gloo).

    python -m tests.gpu.layouts --device cuda --ranks 4 --lines runs/gpu-multi/results.jsonl

The program starts ranks with torchrun; they run every layout of that many ranks, one after the other. If one fails or
hangs, the ranks are started again for the rest. Terms are compared relative to 1 or their size, gradients relative to
their norm.

Tolerances on GPUs were chosen before any run on one: 5e-5 for float32 terms, 1e-3 for gradients. On a CPU they are
1e-6 and 1e-5. On a GPU the delta's products are sums of bf16 parts' products, with an error of 1e-5 of the norm
(benchmarks/LOG.md), and their terms are about ten times larger than their sum. A lost reduction or a shifted layer
gives an error of 1e-1 and more. Layouts that need TransformerEngine's attention run in bf16, with 2e-2 and 1e-1 (on
CPUs bf16 has errors of 3e-3 and 3e-2).
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import os
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import lines
from megatron_fdd.host import rehearsal
from tests.gpu import te_is_there
from tests.harness.rank_process import Call, remember_no_layout, run_call
from tests.oracle.case import (
    ALL_EXPERTS,
    GRADIENT_TOLERANCE,
    TERM_TOLERANCE,
    Case,
    expected,
    relative,
    run_step,
)
from tests.oracle.reference import STUDENT, TEACHER, Terms

LIVE = Terms(live=True)
# Settings that fused attention supports; on a GPU, only fused attention can cut a sequence.
ATTENTION: dict[str, Any] = {
    "student": replace(STUDENT, hidden=64, heads=4, groups=2, head_width=32, ffn=96),
    "teacher": replace(TEACHER, hidden=96, heads=4, groups=4, head_width=32, ffn=120),
    "length": 64,
}
CASES = {
    "tp2": Case(tp=2),
    "tp2-sp": Case(tp=2, sequence_parallel=True),
    "pp2": Case(pp=2),
    "pp2-vpp3": Case(pp=2, vpp=3),
    "dp2": Case(dp=2),
    "cp2": Case(cp=2, **ATTENTION),
    "ep2": Case(dp=2, ep=2, teacher_ep=2, **ALL_EXPERTS),
    "pp2-live": Case(pp=2, terms=LIVE),
    "tp2-pp2-sp": Case(tp=2, pp=2, sequence_parallel=True),
    "pp2-vpp2-tp2-sp": Case(tp=2, pp=2, vpp=2, sequence_parallel=True),
    "pp4": Case(pp=4, micro_batches=6),
    "tp4-sp": Case(tp=4, sequence_parallel=True),
    "pp2-dp2": Case(pp=2, dp=2),
    "tp2-cp2-sp": Case(tp=2, cp=2, sequence_parallel=True, **ATTENTION),
    "pp2-live-tp2-sp": Case(tp=2, pp=2, sequence_parallel=True, terms=LIVE),
    "ep2-pp2": Case(pp=2, dp=2, ep=2, teacher_ep=2, **ALL_EXPERTS),
    "tp2-pp2-dp2-sp": Case(tp=2, pp=2, dp=2, sequence_parallel=True),
    "tp2-pp4-sp": Case(tp=2, pp=4, sequence_parallel=True, micro_batches=6),
    "tp2-pp2-cp2-sp": Case(tp=2, pp=2, cp=2, sequence_parallel=True, **ATTENTION),
}
# The layouts of a rehearsal of this file; tests/step/test_layouts.py has the rest.
ON_CPUS = ("tp2-sp", "pp2-vpp3", "cp2", "ep2")
TOLERANCES = {
    ("cpu", False): (TERM_TOLERANCE, GRADIENT_TOLERANCE),
    ("cuda", False): (5e-5, 1e-3),
    ("cuda", True): (2e-2, 1e-1),
}
# A layout's line until it ends. If the whole run is cut off, the line stays, and the layout starts again.
BEGUN = "begun"
# The time limit of a layout; after it the ranks are ended and started again.
CASE_TIMEOUT_S = 120
TRIES = 4


def errors_of(case: Case) -> tuple[float, float]:
    """Return, on every rank, the distance of terms and gradients from float64, on the rank where it is largest."""
    result, wanted = run_step(case), expected(case)
    terms = [
        abs(value - wanted.means[name]) / max(1.0, abs(wanted.means[name]))
        for name, value in result.means.items()
        if name in wanted.means
    ]
    gradients = [
        relative(gradient - wanted.gradients[name], wanted.gradients[name])
        for name, gradient in result.gradients.items()
    ]
    own = (max(terms, default=0.0), max(gradients))
    found: list[tuple[float, float]] = [own] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return max(each[0] for each in found), max(each[1] for each in found)


def join_world(device: str) -> None:
    """Join the ranks that torchrun started, over NCCL, or in a rehearsal over gloo."""
    if device == "cpu":
        rehearsal.start()
    else:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    remember_no_layout()
    dist.init_process_group("gloo" if device == "cpu" else "nccl", timeout=timedelta(seconds=CASE_TIMEOUT_S))


def run_case(name: str, device: str, path: Path) -> None:
    """Run a case on every rank. Rank 0 writes that it begins and how it ends; another rank writes that it fails."""
    case, rank = CASES[name], dist.get_rank()
    if device == "cuda" and case.cp > 1:  # only TransformerEngine's attention cuts a sequence
        case = replace(case, transformer_impl="transformer_engine", bf16=True)
    about = {"name": name, "ranks": dist.get_world_size(), "bf16": case.bf16, "device": device}
    if rank == 0:
        lines.write(path, "layout", {**about, "ending": BEGUN})
    faulthandler.dump_traceback_later(CASE_TIMEOUT_S, exit=True)
    outcome = run_call(Call(__name__, "errors_of", {"case": case}, case.layout), rank)
    faulthandler.cancel_dump_traceback_later()
    if outcome.bad:
        lines.write(
            path, "layout", {**about, "ending": "failed", "why": f"rank {rank}: {outcome.detail[:2000]}"}
        )
        print(outcome.detail, file=sys.stderr, flush=True)
        os._exit(1)  # other ranks may be waiting for this one
    terms, gradients = outcome.value
    allowed = TOLERANCES[device, case.bf16]
    ending = "passed" if terms <= allowed[0] and gradients <= allowed[1] else "failed"
    if rank == 0:
        lines.write(path, "layout", {**about, "ending": ending, "terms": terms, "gradients": gradients})
        print(f"{name}: {ending}; terms off by {terms:.1e}, gradients by {gradients:.1e}", flush=True)


def last_lines(ranks: int, device: str, path: Path) -> dict[str, lines.Line]:
    """Return the last line about each layout of so many ranks."""
    found = lines.read(path, "layout")
    return {line["name"]: line for line in found if (line["ranks"], line["device"]) == (ranks, device)}


def to_do(ranks: int, device: str, path: Path) -> list[str]:
    """Return the layouts of so many ranks that have not ended."""
    done = {name for name, line in last_lines(ranks, device, path).items() if line["ending"] != BEGUN}
    fitting = [name for name, case in CASES.items() if case.layout.world_size == ranks]
    if device == "cpu":
        fitting = [name for name in fitting if name in ON_CPUS]
    elif not te_is_there():  # only its attention cuts a sequence
        fitting = [name for name in fitting if CASES[name].cp == 1]
    return [name for name in fitting if name not in done]


def launch(ranks: int, device: str, path: Path) -> int:
    """Start ranks until every layout has ended in some way; return 1 if one has not passed."""
    command = f"-m torch.distributed.run --standalone --nproc-per-node {ranks} -m tests.gpu.layouts"
    for _ in range(TRIES):
        if not to_do(ranks, device, path):
            break
        subprocess.run([sys.executable, *command.split(), *sys.argv[1:]], check=False)
        give_up(ranks, device, path)
    endings = {line["ending"] for line in last_lines(ranks, device, path).values()}
    return 0 if not to_do(ranks, device, path) and endings == {"passed"} else 1


def give_up(ranks: int, device: str, path: Path) -> None:
    """Give up, when no rank runs, the layouts that began and have not ended."""
    for line in last_lines(ranks, device, path).values():
        if line["ending"] == BEGUN:
            lines.write(path, "layout", line | {"ending": "hung or ended by another"})


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu.layouts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--lines", type=Path, required=True)
    args = parser.parse_args()
    if "RANK" not in os.environ:
        return launch(args.ranks, args.device, args.lines)
    join_world(args.device)
    left = [to_do(args.ranks, args.device, args.lines)]
    dist.broadcast_object_list(left)
    for name in left[0]:
        run_case(name, args.device, args.lines)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
