"""The Triton kernels at their real sizes, compiled for GPUs that this machine lacks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.tier("all")

pytest.importorskip("triton")
LINE = re.compile(
    r"\w+ \S+ (?P<head>live|still|held|inner) (?P<name>\w+) +(?P<registers>\d+) +(?P<spilled>\d+) +\d+B *(?P<counts>.*)"
)
# A program has 8 warps. With more registers a multiprocessor has room for fewer than three, too few to hide its loads.
MOST_REGISTERS = 80
# Where largest logits of tiles are stored too; such a thread has twice the bytes on their way, two programs do.
MOST_WITH_PEAKS = 96


def report(folder: Path, capability: str, arguments: str) -> list[re.Match[str]]:
    """Return the lines of the compiler's figures."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    # `tv` is not built in.
    program = "import examples.extend.divergence, benchmarks.kernel_report as report; report.main()"
    command = [sys.executable, "-c", program, "--capability", capability]
    command += ["--temperatures", "1", *arguments.split()]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = [LINE.fullmatch(line) for line in result.stdout.splitlines()[1:]]
    assert all(lines), result.stdout
    return [line for line in lines if line]


def count(line: re.Match[str], instruction: str) -> int:
    found = re.search(rf"(\d+) {instruction}\b", line["counts"])
    return int(found[1]) if found else 0


@pytest.mark.parametrize(
    ("capability", "arguments", "kernels"),
    [
        ("90", "--kinds fkl --heads still live", {"softmax", "statistics", "gradient"}),
        ("90", "--kinds fkl --heads inner", {"statistics", "gradient"}),
        ("80", "--kinds jsd --heads still live held", {"statistics", "second", "gradient"}),
        ("90", "--kinds tv --heads live", {"statistics", "second", "gradient"}),
    ],
)
def test_kernels_fit(tmp_path: Path, capability: str, arguments: str, kernels: set[str]) -> None:
    """No thread spills registers; logits are read and weights written many bytes at a time."""
    lines = report(tmp_path, capability, arguments)
    for line in lines:
        assert int(line["spilled"]) == 0, line[0]
        most = MOST_WITH_PEAKS if line["head"] == "inner" else MOST_REGISTERS
        assert int(line["registers"]) <= most, line[0]
        assert count(line, "ld 16"), line[0]
    assert {line["name"] for line in lines} == kernels


@pytest.mark.parametrize("vocab_size", [50_257, 151_669])
def test_any_vocabulary_is_read_16_bytes_at_a_time(tmp_path: Path, vocab_size: int) -> None:
    """Rows of held logits and of the last streamed tile are read and written as fast as others."""
    lines = report(tmp_path, "90", f"--kinds fkl --heads still held --vocab {vocab_size}")
    programs: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for line in lines:
        assert int(line["spilled"]) <= (4 if line["head"] == "still" else 0), line[0]
        programs.setdefault((line["head"], line["name"]), []).append(
            (count(line, "ld 16"), count(line, "st 16"))
        )
    wanted = {
        # First what has 4,096 columns, then the rest: 1,105 of 50,257; 117 of 151,669 are one column for each thread.
        # With 4 and 4 of the sums, which are rescaled where a row leaps.
        ("still", "softmax"): [(12, 8), (8, 6) if vocab_size == 50_257 else (4, 4)],
        # One program for the whole row, 2,048 columns of both models at a time.
        ("held", "statistics"): [(4, 0)],
        ("held", "gradient"): [(4, 1)],
    }
    assert programs == wanted
