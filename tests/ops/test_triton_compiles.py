"""The Triton kernels at their real sizes, compiled for GPUs that this machine lacks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.tier("default")

pytest.importorskip("triton")
LINE = re.compile(
    r"\w+ \S+ (?:live|still) (?P<name>\w+) +(?P<registers>\d+) +(?P<spilled>\d+) +\d+B *(?P<counts>.*)"
)
# A program has 8 warps. With more registers a multiprocessor has room for fewer than three, too few to hide its loads.
MOST_REGISTERS = 80


@pytest.mark.parametrize(
    ("capability", "arguments", "kernels"),
    [
        ("90", "--kinds fkl", {"softmax", "gradient", "rescale"}),
        ("80", "--kinds jsd", {"softmax", "second", "gradient"}),
        ("90", "--kinds tv --heads live", {"softmax", "second", "gradient"}),
    ],
)
def test_kernels_fit(tmp_path: Path, capability: str, arguments: str, kernels: set[str]) -> None:
    """No thread spills registers; logits are read and weights written many bytes at a time."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    # `tv` is not built in.
    program = "import examples.extend.divergence, benchmarks.kernel_report as report; report.main()"
    command = [sys.executable, "-c", program, "--capability", capability]
    command += ["--temperatures", "1", *arguments.split()]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = [LINE.fullmatch(line) for line in result.stdout.splitlines()[1:]]
    assert all(lines), result.stdout
    for line in lines:
        assert int(line["spilled"]) == 0, line[0]
        assert int(line["registers"]) <= MOST_REGISTERS, line[0]
        assert re.search(r"\d+ ld 16\b", line["counts"]), line[0]
    assert {line["name"] for line in lines} == kernels
