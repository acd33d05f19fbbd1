"""The doctor's report: every check is reported, whatever another check does."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megatron_fdd.doctor import machine, report


def broken() -> None:
    """Fail as a check may fail."""
    raise OSError("no such device\nand more of it")


def test_an_exception_is_a_line_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "free_disk", broken)
    monkeypatch.setattr(report, "CHECKS", ("machine.free_disk", "machine.open_files"))
    assert report.run(gpu=False) == 1
    first, second, last = capsys.readouterr().out.splitlines()
    assert first == "FAIL  free disk: the check ended with OSError: no such device"
    assert "ulimit -n: " in second
    assert last.endswith("1 FAIL")


def test_what_cannot_be_imported_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron_fdd.doctor.seams", None)
    first, second = report.findings(["seams.patches", "machine.cores"])
    assert (first.level, first.name) == ("FAIL", "patches")
    assert first.text.startswith("the check ended with ModuleNotFoundError")
    assert second.name == "cores"


def test_the_gpu_is_looked_at_only_when_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "CHECKS", ("machine.cores",))
    monkeypatch.setattr(report, "GPU_CHECKS", ("machine.open_files",))
    report.run(gpu=False)
    assert "ulimit" not in capsys.readouterr().out
    report.run(gpu=True)
    assert "ulimit" in capsys.readouterr().out


@pytest.mark.tier("default")
def test_this_machine_is_fit() -> None:
    """The doctor runs in a process of its own: this one may be a rehearsal, in which torch claims a GPU."""
    command = [sys.executable, "-m", "megatron_fdd", "doctor"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = result.stdout.splitlines()
    assert [line for line in lines if line.startswith("FAIL")] == []
    assert result.returncode == 0, result.stderr
    assert len(lines) > 50
    assert all(line.startswith(("ok    ", "warn  ")) for line in lines[:-1])
