"""tests/gpu/multi.sh on a CPU: two ranks over gloo, from end to end at toy sizes."""

from __future__ import annotations

import os
import subprocess
import tarfile
from pathlib import Path

from benchmarks import lines

ROOT = Path(__file__).parents[2]


def test_on_a_cpu_from_end_to_end(tmp_path: Path) -> None:
    result = subprocess.run(
        ["bash", str(ROOT / "tests/gpu/multi.sh")],
        env=os.environ | {"DEVICE": "cpu", "OUT": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    path = tmp_path / "results.jsonl"
    layouts = {line["name"]: line for line in lines.read(path, "layout")}
    assert {line["ending"] for line in layouts.values()} == {"passed"}
    assert len(layouts) == 4
    (curve,) = lines.read(path, "curve")
    assert curve["ending"] == "passed"
    assert curve["steps"] == 20
    ends = lines.read(path, "ending")
    assert [line["name"] for line in ends] == ["a rank is killed", "a rank fails alone"]
    assert {(line["ending"], line["left"], line["said"]) for line in ends} == {("passed", 0, 1)}
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        assert set(archive.getnames()) == {"results.jsonl", "results.md", "log.txt"}
        page = archive.extractfile("results.md")
        assert page is not None
        assert "no GPU had seen it" in page.read().decode()
