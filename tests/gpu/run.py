"""The sections of `tests/gpu/run.sh` (which explains its variables), the most useful first."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from benchmarks import lines
from tests.gpu import te_is_there
from tests.gpu.knobs import Knobs, RefusedError, commit, gpus, refuse_absent_gpus
from tests.gpu.sections import SIGNALS, Runner, Section, say

PYTHON = (sys.executable, "-m")
TESTS = (*PYTHON, "pytest", "-v", "-rs", "-p", "no:cacheprovider")
SITE = Path(".gpu/site").resolve()
# This hides a package that cannot be imported, from this process and from all that it starts.
HIDING = "import sys\nsys.modules['transformer_engine'] = None\n"
# A function that returns sections, from the file for lines and whether TransformerEngine can be imported.
Plan = Callable[[Knobs, Path, bool], list[Section]]
NO_TE = "TransformerEngine cannot be imported here"


def beginnings(device: str, results: Path) -> list[Section]:
    """Return the sections that show whether anything can run here."""
    machine = (*PYTHON, "tests.gpu.machine", "--device", device, "--lines", str(results))
    te = (sys.executable, "-c", "import torch, transformer_engine.pytorch as te; print(te.__file__)")
    missing = "" if te_is_there() else "TransformerEngine is not installed"
    return [
        Section("machine", machine, 60, always=True),
        Section("transformer-engine", te, 60, missing=missing, beside=True, always=True),
    ]


def sections(knobs: Knobs, results: Path, has_te: bool) -> list[Section]:
    """Return all sections, the most useful first. Figures of toy sizes mean nothing."""
    device, toy = knobs.device, knobs.device == "cpu"
    losses = (*PYTHON, "benchmarks.interleaved", "--device", device, "--lines", str(results))
    parallel = ("-n", str(knobs.workers)) if importlib.util.find_spec("xdist") and not toy else ()
    operations = (
        "tests/gpu/test_ops.py",
        "tests/gpu/test_taps.py",
        "tests/gpu/test_late_streams.py",
        "tests/gpu/test_host_memory.py",
        "tests/gpu/test_transformer_engine.py",
    )
    no_te = "" if has_te else NO_TE
    return [
        Section("losses", losses, 150, least_s=20),
        Section("operations", (*TESTS, *parallel, *operations), 120, least_s=20),
        Section("small-runs", (*TESTS, "tests/gpu/test_distill.py"), 200, least_s=60, beside=True),
        Section("step", step(device, results), 190, least_s=60),
        Section("step-fp8", step(device, results, *FP8), 150, least_s=60, missing=no_te),
        Section("kernels", PROFILER, 60, least_s=20, missing=without_gpu(toy, "ncu")),
        Section("memory-checks", SANITIZER, 90, least_s=30, missing=without_gpu(toy, "compute-sanitizer")),
        Section("more-tests", (*TESTS, *parallel, *MORE), 170, least_s=30, missing=without_gpu(toy)),
    ]


FP8 = ("--fp8-format", "hybrid", "--fp8-recipe", "tensorwise", "--teacher-fp8-format", "e4m3")
# It shows both kernels and cuBLAS's products for an odd vocabulary, by name, with bytes a second.
PROFILER = (
    *"ncu --clock-control none --section SpeedOfLight --launch-skip 200 --launch-count 40".split(),
    *(*PYTHON, "benchmarks.interleaved", "--device", "cuda", "--rounds", "1"),
    *("--only", "final logits, vocabulary 50,257"),
)
SANITIZER = (
    *("compute-sanitizer", "--error-exitcode", "1", *TESTS, "tests/gpu/test_ops.py"),
    *("-k", "every_divergence and triton and bf16 and (fkl or jsd)"),
)
MORE = (
    "tests/ops/test_triton.py",
    "tests/ops/test_triton_held.py",
    "tests/ops/test_kept_tiles.py",
    "tests/ops/test_triton_compiles.py",
    "tests/convert/test_transformer_engine.py",
)


def step(device: str, results: Path, *flags: str) -> tuple[str, ...]:
    """Return the command for a whole step: FDD, then logit KD."""
    command = (*PYTHON, "benchmarks.step", "--device", device, "--parts", "--lines", str(results))
    if device == "cpu":
        return (*command, "--smoke", *flags)
    return (*command, "--bf16", "--budget-s", "160", "--models", "runs/gpu-models", *flags)


def without_gpu(toy: bool, program: str = "") -> str:
    """Return why a section that needs a GPU, and perhaps a program, cannot run."""
    if toy:
        return "needs a GPU"
    return f"{program} is not on PATH" if program and shutil.which(program) is None else ""


def install(wheels: Sequence[Path]) -> None:
    """Unpack the wheels, unless an earlier call has; put them in front of installed packages."""
    names = [wheel.name for wheel in wheels]
    done = SITE / "installed"
    if not done.exists() or done.read_text().split() != names:
        pip = (*PYTHON, *"pip install -q --no-index --no-deps --no-compile --upgrade --target".split())
        if subprocess.run([*pip, str(SITE), *map(str, wheels)], check=False).returncode:
            raise RefusedError(
                f"WHEELS={wheels[0].parent}: pip cannot install them, as it says above; take out what is damaged or of "
                "another Python"
            )
        done.write_text("\n".join(names))
    put_in_front(SITE)


def put_in_front(folder: Path) -> None:
    """Put a folder first on the path of this process and of all that it starts."""
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = f"{folder}:{os.environ['PYTHONPATH']}"


def hide_transformer_engine() -> None:
    """Hide a TransformerEngine that is installed but broken, so that everything else can run."""
    folder = SITE.parent / "without"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(HIDING)
    put_in_front(folder)


def stop(signal_number: int, _: FrameType | None) -> None:
    """End all sections and write the page before this process ends; a second signal does not disturb that."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if signal_number == signal.SIGHUP:  # nobody reads the output, and printing would fail
        sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
    raise SystemExit(128 + signal_number)


def main(title: str, sections: Plan, at_end: Callable[[Path], None] = lambda _: None) -> int:
    """Run what the environment asks for (`Knobs`), alone in its folder; report in one line what stops it.

    Args:
        at_end: gets the folder after the sections have run, also after an interruption.

    Returns the exit status: 0 if all passed, 1 if not, 2 if it was refused or could not write.

    Raises:
        SystemExit: 128 + the number of the signal that ended it.
    """
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
            signal.signal(number, stop)
    try:
        knobs = Knobs.read(os.environ)
        with alone_in(knobs.out):
            try:
                return 0 if conduct(knobs, title, sections, at_end) else 1
            except SystemExit:
                say(f"interrupted; the same command goes on; results so far: {knobs.out}/results.md")
                raise
    except (RefusedError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


@contextlib.contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Refuse a folder that cannot be written, or that another run writes to."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / "lock").open("w")
    except OSError as error:
        raise RefusedError(f"OUT={out} cannot be written: {error}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RefusedError(f"OUT={out}: another run writes there; wait for it, or set OUT") from None
        yield


def conduct(knobs: Knobs, title: str, sections: Plan, at_end: Callable[[Path], None]) -> bool:
    """Run all sections; return whether everything that could run has passed."""
    deadline = time.monotonic() + knobs.budget_s
    if knobs.device == "cpu":
        title = f"Rehearsal on a CPU: {title}"
    runner = Runner(knobs.out, deadline, title, knobs.part, copy=knobs.state, retries=knobs.retry)
    if knobs.wheels:
        install(knobs.wheels)
    refuse_absent_gpus(knobs)
    prepare(knobs, runner.results)
    try:
        well = runner.run(beginnings(knobs.device, runner.results))
        if runner.ended["machine"] == "passed":
            if runner.ended["transformer-engine"] not in ("passed", "skipped"):
                hide_transformer_engine()
            has_te = runner.ended["transformer-engine"] == "passed"
            well &= runner.run(sections(knobs, runner.results, has_te))
        say(f"\nresults: {knobs.out}/results.md; {'all passed' if well else 'NOT ALL PASSED'}")
        for line in runner.misses():
            say(line)
    finally:
        at_end(knobs.out)
    return well


def forget(folder: Path) -> None:
    """Delete what earlier calls left in the folder."""
    for name in ("results.jsonl", "results.md", "log.txt"):
        (folder / name).unlink(missing_ok=True)


def prepare(knobs: Knobs, results: Path) -> None:
    """Find the results of an earlier call, to continue from; give them another name if they are of something else."""
    if knobs.fresh:
        forget(knobs.out)
        try:
            forget(knobs.state)
        except OSError as error:
            say(f"warning: STATE={knobs.state} keeps what it has: {error}")
    earlier = knobs.state / results.name
    # A first part never continues from results elsewhere.
    if knobs.part == "2" and earlier.exists() and not results.exists():
        shutil.copy(earlier, results)
    now = {"device": knobs.device, "gpus": gpus(knobs.device), "commit": commit()}
    same = {name for name in now if not (knobs.retry and name == "commit")}  # what was mended is tried again
    before = [{name: line.get(name) for name in now} for line in lines.read(results, "call")]
    if results.exists() and not (before and all(before[-1][name] == now[name] for name in same)):
        was = before[-1] if before else "unknown origin"
        put_aside(results, f"is of {was}, this call of {now}")
    if earlier.exists() and not results.exists():  # what begins now will be copied there
        put_aside(earlier, f"is of an earlier call, and OUT={knobs.out} has nothing to go on from")
    lines.write(results, "call", now | {"part": knobs.part})


def put_aside(path: Path, why: str) -> None:
    """Give results another name."""
    kept = path.with_name(time.strftime("results-%Y%m%d-%H%M%S.jsonl"))
    path.rename(kept)
    say(f"{path} {why}: it is kept as {kept}, and all begins anew")


if __name__ == "__main__":
    sys.exit(main(f"GPU results, part {os.environ['PART']}", sections))
