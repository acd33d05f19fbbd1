"""Steps of toy models at several layouts against the float64 oracle, over NCCL (with --device cpu over gloo).

    python -m tests.gpu.layouts --device cuda --ranks 4 --lines runs/gpu-multi/results.jsonl

Starts ranks with torchrun, which run every layout of so many ranks one after the other. Where one fails or hangs, the
ranks are started again for the rest. Terms are compared relative to 1 or their size, gradients to their norm.

Tolerances on GPUs, stated before any had been seen: float32 terms 5e-5, gradients 1e-3. The CPU's are 1e-6 and
1e-5; on a GPU the delta's products are sums of TF32 parts, off by 1e-5 of the norm (benchmarks/LOG.md), of terms that
are some ten times larger than their sum. A lost reduction or a shifted layer is off by 1e-1 and more. bf16, where a
layout needs TransformerEngine's attention: 2e-2 and 1e-1 (on CPUs bf16 is off by 3e-3 and 3e-2).
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
# What fused attention takes, which alone cuts a sequence on a GPU.
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
# A rehearsal of this file; the rest is in tests/step/test_layouts.py.
ON_CPUS = ("tp2-sp", "pp2-vpp3", "cp2", "ep2")
TOLERANCES = {
    ("cpu", False): (TERM_TOLERANCE, GRADIENT_TOLERANCE),
    ("cuda", False): (5e-5, 1e-3),
    ("cuda", True): (2e-2, 1e-1),
}
# A layout's line until it has ended; one that was cut off with the whole run keeps it, and is begun again.
BEGUN = "begun"
# Of a layout, after which the ranks are ended and started again.
CASE_TIMEOUT_S = 120
TRIES = 4


def errors_of(case: Case) -> tuple[float, float]:
    """Body on every rank: how far terms and gradients are from float64, on the rank where it is most."""
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
    """As torchrun says it, over NCCL, or in a rehearsal over gloo."""
    if device == "cpu":
        rehearsal.start()
    else:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    remember_no_layout()
    dist.init_process_group("gloo" if device == "cpu" else "nccl", timeout=timedelta(seconds=CASE_TIMEOUT_S))


def run_case(name: str, device: str, path: Path) -> None:
    """On every rank. Rank 0 writes that it begins and how it ends; another rank that it fails."""
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
        os._exit(1)  # the others may be waiting for it
    terms, gradients = outcome.value
    allowed = TOLERANCES[device, case.bf16]
    ending = "passed" if terms <= allowed[0] and gradients <= allowed[1] else "failed"
    if rank == 0:
        lines.write(path, "layout", {**about, "ending": ending, "terms": terms, "gradients": gradients})
        print(f"{name}: {ending}; terms off by {terms:.1e}, gradients by {gradients:.1e}", flush=True)


def last_lines(ranks: int, device: str, path: Path) -> dict[str, lines.Line]:
    """What is known of each layout of so many ranks."""
    found = lines.read(path, "layout")
    return {line["name"]: line for line in found if (line["ranks"], line["device"]) == (ranks, device)}


def to_do(ranks: int, device: str, path: Path) -> list[str]:
    """Layouts of so many ranks that have not ended."""
    done = {name for name, line in last_lines(ranks, device, path).items() if line["ending"] != BEGUN}
    fitting = [name for name, case in CASES.items() if case.layout.world_size == ranks]
    if device == "cpu":
        fitting = [name for name in fitting if name in ON_CPUS]
    elif not te_is_there():  # whose attention alone cuts a sequence
        fitting = [name for name in fitting if CASES[name].cp == 1]
    return [name for name in fitting if name not in done]


def launch(ranks: int, device: str, path: Path) -> int:
    """Start ranks until every layout has ended in some way; 1 where one has not passed."""
    command = f"-m torch.distributed.run --standalone --nproc-per-node {ranks} -m tests.gpu.layouts"
    for _ in range(TRIES):
        if not to_do(ranks, device, path):
            break
        subprocess.run([sys.executable, *command.split(), *sys.argv[1:]], check=False)
        give_up(ranks, device, path)
    endings = {line["ending"] for line in last_lines(ranks, device, path).values()}
    return 0 if not to_do(ranks, device, path) and endings == {"passed"} else 1


def give_up(ranks: int, device: str, path: Path) -> None:
    """Once no rank runs: what began and has not ended is not tried again."""
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
