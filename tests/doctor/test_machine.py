"""What the doctor finds on a machine that is short of something."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_fdd.doctor import machine
from megatron_fdd.doctor.finding import Finding


def only(check: Callable[[], Iterator[Finding]]) -> Finding:
    """Return the only finding of a check."""
    [found] = check()
    return found


@pytest.mark.parametrize(("mib", "level"), [(64, "warn"), (4096, "ok")])
def test_shared_memory(mib: int, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(total=mib << 20))
    assert only(machine.shared_memory).level == level


@pytest.mark.parametrize(("soft", "level"), [(1024, "warn"), (65536, "ok"), (resource.RLIM_INFINITY, "ok")])
def test_open_files(soft: int, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _what: (soft, resource.RLIM_INFINITY))
    finding = only(machine.open_files)
    assert finding.level == level
    assert "-1" not in str(finding)


@pytest.mark.parametrize(("gib", "level"), [(1, "warn"), (100, "ok")])
def test_free_disk(gib: int, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=gib << 30))
    assert only(machine.free_disk).level == level


@pytest.mark.parametrize(("threads", "level"), [(None, "ok"), ("1", "ok"), ("64", "warn"), ("many", "warn")])
def test_cores(threads: str | None, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: {0, 1})
    if threads is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert only(machine.cores).level == level


@pytest.mark.parametrize(("writable", "level"), [(True, "ok"), (False, "FAIL")])
def test_compiler_cache(writable: bool, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A superuser may write everywhere, so the system's answer is made up."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "not" / "yet"))
    asked: list[Path] = []
    monkeypatch.setattr(os, "access", lambda path, _mode: asked.append(path) or writable)
    assert only(machine.compiler_cache).level == level
    assert asked == [tmp_path]
