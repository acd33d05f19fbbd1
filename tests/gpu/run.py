"""The sections of `tests/gpu/run.sh`, which tells its knobs: what is most worth knowing first."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from tests.gpu import te_is_there
from tests.gpu.sections import Runner, Section

PYTHON = (sys.executable, "-m")
TESTS = (*PYTHON, "pytest", "-v", "-rs", "-p", "no:cacheprovider")
SITE = Path(".gpu/site").resolve()
# A package that cannot be imported is then as if it were not there, for this process and all that it starts.
HIDING = "import sys\nsys.modules['transformer_engine'] = None\n"
NO_TE = "TransformerEngine cannot be imported here"


def beginnings(device: str, lines: Path) -> list[Section]:
    """Whether anything can run here."""
    machine = (*PYTHON, "tests.gpu.machine", "--device", device, "--lines", str(lines))
    te = (sys.executable, "-c", "import torch, transformer_engine.pytorch as te; print(te.__file__)")
    missing = "" if te_is_there() else "TransformerEngine is not installed"
    return [
        Section("machine", machine, 60, always=True),
        Section("transformer-engine", te, 60, missing=missing, beside=True, always=True),
    ]


def sections(device: str, lines: Path, has_te: bool) -> list[Section]:
    """In the order of what is most worth knowing. A toy's figures mean nothing."""
    toy, workers = device == "cpu", os.environ["WORKERS"]
    losses = (*PYTHON, "benchmarks.interleaved", "--device", device, "--lines", str(lines))
    parallel = ("-n", workers) if importlib.util.find_spec("xdist") and not toy else ()
    operations = (
        "tests/gpu/test_ops.py",
        "tests/gpu/test_late_streams.py",
        "tests/gpu/test_transformer_engine.py",
    )
    no_te = "" if has_te else NO_TE
    return [
        Section("losses", losses, 150, least_s=20),
        Section("operations", (*TESTS, *parallel, *operations), 120, least_s=20),
        Section("small-runs", (*TESTS, "tests/gpu/test_distill.py"), 200, least_s=60, beside=True),
        Section("step", step(device, lines), 190, least_s=60),
        Section("step-fp8", step(device, lines, *FP8), 150, least_s=60, missing=no_te),
        Section("kernels", PROFILER, 60, least_s=20, missing=without_gpu(toy, "ncu")),
        Section("memory-checks", SANITIZER, 90, least_s=30, missing=without_gpu(toy, "compute-sanitizer")),
        Section("more-tests", (*TESTS, *parallel, *MORE), 170, least_s=30, missing=without_gpu(toy)),
    ]


FP8 = ("--fp8-format", "hybrid", "--fp8-recipe", "tensorwise", "--teacher-fp8-format", "e4m3")
# Both kernels of a row that is not aligned, and cuBLAS's products with it, by name, with bytes a second.
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
    "tests/ops/test_triton_compiles.py",
    "tests/convert/test_transformer_engine.py",
)


def step(device: str, lines: Path, *flags: str) -> tuple[str, ...]:
    """A whole step: FDD, then logit KD."""
    command = (*PYTHON, "benchmarks.step", "--device", device, "--parts", "--lines", str(lines))
    if device == "cpu":
        return (*command, "--smoke", *flags)
    return (*command, "--bf16", "--budget-s", "160", "--models", "runs/gpu-models", *flags)


def without_gpu(toy: bool, program: str = "") -> str:
    """Why a section cannot run that needs a GPU, and perhaps a program."""
    if toy:
        return "needs a GPU"
    return f"{program} is not on PATH" if program and shutil.which(program) is None else ""


def install(wheels: str) -> None:
    """Unpack the wheels, unless an earlier call has; in front of what is installed."""
    given = sorted(path.name for path in Path(wheels).glob("*.whl"))
    done = SITE / "installed"
    if not done.exists() or done.read_text().split() != given:
        pip = (*PYTHON, *"pip install -q --no-index --no-deps --no-compile --upgrade --target".split())
        subprocess.run([*pip, str(SITE), *(str(Path(wheels) / name) for name in given)], check=True)
        done.write_text("\n".join(given))


def put_in_front(folder: Path) -> None:
    """On the path of this process and of all that it starts."""
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = f"{folder}:{os.environ['PYTHONPATH']}"


def hide_transformer_engine() -> None:
    """It is installed and broken: everything goes on as if it were not there."""
    folder = SITE.parent / "without"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(HIDING)
    put_in_front(folder)


def stop(signal_number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + signal_number)


def conduct(title: str, sections: Callable[[str, Path, bool], list[Section]]) -> bool:
    """Run what the environment says: `DEVICE`, `PART`, `BUDGET_S`, `OUT`, `STATE`, `FRESH` and `WHEELS`.

    Args:
        sections: of a device and a file for lines; whether TransformerEngine can be imported.

    Returns whether everything that could run has passed.
    """
    deadline = time.monotonic() + float(os.environ["BUDGET_S"])
    signal.signal(signal.SIGTERM, stop)
    device, part, out = os.environ["DEVICE"], os.environ["PART"], Path(os.environ["OUT"])
    runner = Runner(out, deadline, title, part, copy=Path(os.environ["STATE"]))
    prepare(runner, fresh=os.environ["FRESH"] == "1")
    if os.environ["WHEELS"]:
        install(os.environ["WHEELS"])
        put_in_front(SITE)
    well = runner.run(beginnings(device, runner.results))
    endings = runner.endings()
    if endings["machine"] == "passed":
        if endings["transformer-engine"] not in ("passed", "skipped"):
            hide_transformer_engine()
        has_te = endings["transformer-engine"] == "passed"
        well &= runner.run(sections(device, runner.results, has_te))
    print(f"\nresults: {out / 'results.md'}; {'all passed' if well else 'NOT ALL PASSED'}")
    return well


def prepare(runner: Runner, *, fresh: bool) -> None:
    """The folder for results, with those of an earlier call."""
    runner.out.mkdir(parents=True, exist_ok=True)
    assert runner.copy is not None
    for folder in (runner.out, runner.copy) if fresh else ():
        for name in ("results.jsonl", "results.md", "log.txt"):
            (folder / name).unlink(missing_ok=True)
    earlier = runner.copy / runner.results.name
    # A first part never goes on from what lies about elsewhere.
    if runner.part == "2" and earlier.exists() and not runner.results.exists():
        shutil.copy(earlier, runner.results)


if __name__ == "__main__":
    sys.exit(0 if conduct(f"GPU results, part {os.environ['PART']}", sections) else 1)
