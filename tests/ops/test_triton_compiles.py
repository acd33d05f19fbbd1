"""The Triton kernels with their real blocks, compiled for GPUs that are not here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
# Shared memory of a program, in KiB; and the instructions that use the tensor cores.
LIMITS = {"80": (163, "mma"), "90": (227, "wgmma")}
LINE = re.compile(
    r"\w+ \S+ (?:live|still) (?P<name>\w+) +(?P<registers>\d+) +(?P<spilled>\d+) +(?P<shared>\d+)K *(?P<counts>.*)"
)


@pytest.mark.parametrize(
    ("capability", "arguments", "spills", "products"),
    [
        ("90", "--kinds fkl", 0, {"softmax", "accumulate", "gradient"}),
        ("80", "--kinds jsd --heads still --skip-below 1e-6", 256, {"softmax", "mixture", "accumulate"}),
    ],
)
def test_kernels_fit(
    tmp_path: Path, capability: str, arguments: str, spills: int, products: set[str]
) -> None:
    """Bytes that a thread spills stay within `spills`; `products` run on tensor cores from 16-byte copies."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "megatron_fdd.ops.gpu.report", "--capability", capability]
    command += ["--temperatures", "1", *arguments.split()]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = [LINE.fullmatch(line) for line in result.stdout.splitlines()[1:]]
    assert all(lines), result.stdout
    shared, tensor_cores = LIMITS[capability]
    seen = set()
    for line in lines:
        assert int(line["spilled"]) <= spills, line[0]
        assert int(line["shared"]) <= shared, line[0]
        if line["name"] in products:
            assert re.search(rf"\d+ {tensor_cores}\b", line["counts"]), line[0]
            assert re.search(r"\d+ cp.async 16\b", line["counts"]), line[0]
            if "--skip-below" not in arguments:  # that loads a list of blocks, number by number
                assert "cp.async less" not in line["counts"], line[0]
            seen.add(line["name"])
    assert seen == products
