"""tests/gpu/run.sh without a GPU: with stand-ins for its programs, what it makes of their endings."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTEST = """\
echo "tests/gpu/test_$name.py::test_one PASSED [ 50%]"
sleep $seconds
echo "tests/gpu/test_$name.py::test_two $second [100%]"
echo "SKIPPED [1] tests/gpu/test_$name.py:9: could not import 'transformer_engine'"
echo "==== 1 passed, 1 other in 2.00s ===="
exit $status
"""
PROGRAMS = {
    "nvidia-smi": "echo 'Some GPU, 580.1, 81559 MiB'",
    "python3": """\
case "$*" in
    -) cat >/dev/null; echo "torch 9.9"; exit $NO_GPU ;;
    *xdist*) exit 1 ;;
    *tests/gpu/test_distill.py) name=distill seconds=$DISTILL_S second=PASSED status=0 ;;
    *) name=ops seconds=0 second=$OPS status=$([[ $OPS == PASSED ]] && echo 0 || echo 1) ;;
esac
"""
    + PYTEST,
    "env": 'echo "one layer 0.04 s"; echo "$*"; exit $BENCHMARKS_STATUS',
}


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder for the front of PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in PROGRAMS.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    return folder


def run(programs: Path, out: Path, **environment: str) -> tuple[int, str]:
    """Exit status and results.md."""
    plain = {"OPS": "PASSED", "DISTILL_S": "0", "BENCHMARKS_STATUS": "0", "NO_GPU": "0"} | environment
    plain |= {"PATH": f"{programs}:{os.environ['PATH']}", "OUT": str(out)}
    script = ["/bin/bash", str(ROOT / "tests" / "gpu" / "run.sh")]
    status = subprocess.run(script, env=plain, capture_output=True, timeout=60, check=False).returncode
    return status, (out / "results.md").read_text()


def test_all_is_well(programs: Path, tmp_path: Path) -> None:
    status, results = run(programs, tmp_path / "out")
    assert status == 0
    assert "Some GPU, 580.1" in results
    assert "torch 9.9" in results
    assert "not passed: nothing" in results
    assert results.count("2 tests passed") == 2
    assert results.count("could not import 'transformer_engine'") == 2
    assert "one layer 0.04 s\nDEVICE=cuda SETUP=0 bash benchmarks/run.sh" in results


def test_what_fails_is_named_and_the_rest_is_run(programs: Path, tmp_path: Path) -> None:
    status, results = run(programs, tmp_path / "out", OPS="FAILED", BENCHMARKS_STATUS="1")
    assert status == 1
    assert "not passed: ops benchmarks\n" in results
    assert "one layer 0.04 s" in results


def test_what_takes_too_long_is_cut_off(programs: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    status, results = run(programs, tmp_path / "out", DISTILL_S="50", BUDGET_S="2")
    assert time.monotonic() - started < 20
    assert status == 1
    assert "not passed: distill (cut off: 2 s were over) benchmarks (cut off: 2 s were over)" in results
    assert "## ops\n\n2 tests passed" in results
    assert "## distill\n\n1 tests passed" in results


def test_without_a_gpu_it_ends_at_once(programs: Path, tmp_path: Path) -> None:
    status, results = run(programs, tmp_path / "out", NO_GPU="1")
    assert status == 1
    assert "## ops" not in results


def test_benchmarks_can_be_left_out(programs: Path, tmp_path: Path) -> None:
    status, results = run(programs, tmp_path / "out", BENCHMARKS="0")
    assert status == 0
    assert "## benchmarks" not in results
