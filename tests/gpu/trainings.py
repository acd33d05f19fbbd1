"""Small trainings on several ranks: the same curve at several layouts, and their end when one rank ends.

    python -m tests.gpu.trainings --device cuda --ranks 2 --lines runs/gpu-multi/results.jsonl

A training is twenty steps of FDD through the real entry point. Each curve's terms are compared with the first run's,
relative to the term's value in the first step. Then a rank of the first run is killed, and in the second run a single
rank fails: both must end within 60 s, leave no process, and say once what happened.

Tolerances on GPUs were chosen before any run on one: 1e-3 for float32 layouts over 20 steps (on CPUs 1e-4); over 6
steps 3e-2 for bf16 through TransformerEngine and 1e-1 for FP8, as on one GPU (`tests/gpu/test_distill.py`).
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import lines
from tests.gpu import te_is_there
from tests.gpu.failing_rank import MESSAGE
from tests.gpu.runs import LOCAL, TE, TIMEOUT_S, farthest, make_models, read_metrics, records, start
from tests.gpu.sections import children

STEPS, FEW_STEPS = 20, 6
# Longer than any curve: the first two runs continue until a rank ends.
SCHEDULE = f"--train-iters 1000 --lr-decay-iters {STEPS}"
END = f"--exit-interval {STEPS}"
TENSOR = "--tensor-model-parallel-size 2 --sequence-parallel"
PIPELINE = "--pipeline-model-parallel-size 2"
FP8 = "--fp8-format hybrid --fp8-recipe tensorwise --teacher-fp8-format e4m3"
ENDS_WITHIN_S = 60.0
FIRST, SECOND = "data parallel", "tensor and sequence parallel"


@dataclass(frozen=True)
class Curve:
    """A run: its flags, and its tolerated distance from the first run, over how many steps."""

    flags: str
    tolerance: float
    steps: int = STEPS


def curves(device: str, *, has_te: bool) -> dict[str, Curve]:
    """Return the curves in the order in which they start."""
    tolerance = 1e-4 if device == "cpu" else 1e-3
    found = {
        FIRST: Curve(f"{LOCAL} --use-distributed-optimizer", tolerance),
        SECOND: Curve(f"{LOCAL} {TENSOR}", tolerance),
    }
    if device == "cpu":
        return found
    found["pipeline"] = Curve(f"{LOCAL} {PIPELINE} {END}", tolerance)
    if has_te:
        found |= {
            "TransformerEngine, tensor parallel": Curve(f"{TE} --bf16 {TENSOR} {END}", 3e-2, FEW_STEPS),
            "TransformerEngine, pipeline": Curve(f"{TE} --bf16 {PIPELINE} {END}", 3e-2, FEW_STEPS),
            "TransformerEngine, context parallel": Curve(
                f"{TE} --bf16 --context-parallel-size 2 {END}", 3e-2, FEW_STEPS
            ),
            "FP8, tensor parallel": Curve(f"{TE} --bf16 {FP8} {TENSOR} {END}", 1e-1, FEW_STEPS),
            "FP8, pipeline": Curve(f"{TE} --bf16 {FP8} {PIPELINE} {END}", 1e-1, FEW_STEPS),
        }
    return found


@dataclass(frozen=True)
class Trainings:
    """The place of the trainings, and the reports about them."""

    root: Path
    device: str
    ranks: int
    path: Path

    def start(self, name: str, flags: str, module: str = "megatron_fdd.distill") -> subprocess.Popen:
        """Start a training under torchrun; the batch is a multiple of what the ranks take at a time."""
        batch = f"--global-batch-size {2 * self.ranks if self.device == 'cpu' else max(8, 2 * self.ranks)}"
        return start(
            self.root / name,
            self.root,
            f"{SCHEDULE} {batch} {flags}",
            device=self.device,
            ranks=self.ranks,
            module=module,
        )

    def tell(self, kind: str, name: str, **more: object) -> bool:
        """Add a line; return whether it says that all is well."""
        record = {"name": name, "device": self.device, "ranks": self.ranks, **more}
        lines.write(self.path, kind, record)
        print(kind, record, flush=True)
        return more["ending"] == "passed"

    def compare(self, name: str, curve: Curve, process: subprocess.Popen) -> bool:
        """Compare a curve with the first run, which has all its steps."""
        about = {"beside": FIRST, "steps": curve.steps, "tolerance": curve.tolerance}
        try:
            if name == SECOND:
                self.wait_for_steps(name, process)
            else:
                records(self.root / name, process)
            ours, wanted = (read_metrics(self.root / each)[: curve.steps] for each in (name, FIRST))
            off = farthest(ours, wanted)
        except (AssertionError, RuntimeError, subprocess.TimeoutExpired) as error:
            return self.tell("curve", name, ending="failed", why=str(error)[-2000:], **about)
        ending = "passed" if off <= curve.tolerance else "failed"
        return self.tell("curve", name, ending=ending, farthest=off, **about)

    def wait_for_steps(self, name: str, process: subprocess.Popen) -> None:
        """Wait for the steps of a run that does not end by itself."""
        deadline = time.monotonic() + TIMEOUT_S
        while len(read_metrics(self.root / name)) < STEPS:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self.root / name / "log").read_text()[-6000:])
            time.sleep(0.1)

    def ends(self, what: str, name: str, process: subprocess.Popen, family: list[int], message: str) -> bool:
        """Whether a run ends in time, with an error, without leaving a process, and reports the reason once."""
        started = time.monotonic()
        try:
            status: int | None = process.wait(ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:
            status = None
        seconds = round(time.monotonic() - started, 1)
        left = [pid for pid in family if is_alive(pid)]
        for pid in [*left, *[process.pid] * (status is None)]:
            os.kill(pid, signal.SIGKILL)
        said = sum(message in line for line in (self.root / name / "log").read_text().splitlines())
        well = status not in (0, None) and not left and said == 1
        ending = "passed" if well else "failed"
        return self.tell("ending", what, ending=ending, seconds=seconds, left=len(left), said=said)


def is_alive(pid: int) -> bool:
    """Whether a process runs: it exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def run_all(trainings: Trainings) -> bool:
    """Run all curves and both endings, in batches, because each process takes about 4 GB of host memory."""
    make_models(trainings.root)
    wanted = curves(trainings.device, has_te=te_is_there())
    first = trainings.start(FIRST, wanted[FIRST].flags)
    os.environ["FDD_FAILS_AT"] = str(STEPS + 1)
    second = trainings.start(SECOND, wanted[SECOND].flags, "tests.gpu.failing_rank")
    trainings.wait_for_steps(FIRST, first)
    workers = children(first.pid)
    os.kill(workers[-1], signal.SIGKILL)
    well = trainings.ends("a rank is killed", FIRST, first, workers, "Signal 9 (SIGKILL) received by PID")
    well &= trainings.compare(SECOND, wanted[SECOND], second)
    message = f"megatron_fdd: error: {MESSAGE}"
    well &= trainings.ends("a rank fails alone", SECOND, second, children(second.pid), message)
    names = list(wanted)[2:]
    for batch in [names[begin : begin + 2] for begin in range(0, len(names), 2)]:
        running = {name: trainings.start(name, wanted[name].flags) for name in batch}
        for name, process in running.items():
            well &= trainings.compare(name, wanted[name], process)
    return well


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu.trainings",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--lines", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        return 0 if run_all(Trainings(Path(root), args.device, args.ranks, args.lines)) else 1


if __name__ == "__main__":
    sys.exit(main())
