"""The checks of GPUs on a machine without one: what they find there, and on made-up GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_fdd.doctor import gpu, toy
from megatron_fdd.doctor.finding import Finding


def see(monkeypatch: pytest.MonkeyPatch, count: int, capability: int = 9) -> None:
    """Make torch see so many GPUs."""
    properties = SimpleNamespace(name="Toy GPU", major=capability, minor=0, total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: properties)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))


@pytest.mark.parametrize(
    ("check", "level"), [(gpu.devices, "warn"), (gpu.all_reduce, "FAIL"), (gpu.toy_run, "FAIL")]
)
def test_without_a_gpu(
    check: Callable[[], Iterator[Finding]], level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    see(monkeypatch, 0)
    [finding] = check()
    assert finding.level == level
    assert "no GPU is visible" in finding.text


def test_each_gpu_and_nccl_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    see(monkeypatch, 2)
    assert [str(each) for each in gpu.devices()] == [
        "ok    GPU 0: Toy GPU, capability 9.0, 80 GiB",
        "ok    GPU 1: Toy GPU, capability 9.0, 80 GiB",
        "ok    NCCL: 2.27.5",
    ]


@pytest.mark.parametrize(
    ("count", "capability", "value", "level"),
    [(2, 9, "", "warn"), (2, 9, "1", "ok"), (2, 10, "", "ok"), (1, 9, "", "ok"), (0, 0, "", "ok")],
)
def test_connections(
    count: int, capability: int, value: str, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    see(monkeypatch, count, capability)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", value)
    [finding] = gpu.connections()
    assert finding.level == level


def test_a_sum_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The all-reduce is replaced by one that does nothing."""
    for name in ("init_process_group", "barrier", "all_reduce", "destroy_process_group"):
        monkeypatch.setattr(dist, name, lambda *_arguments, **_keywords: None)
    monkeypatch.setattr(gpu, "_MESSAGE_ELEMENTS", 8)
    with pytest.raises(RuntimeError, match="all-reduce over 2 processes: 8 of 8 sums are wrong"):
        gpu._sum(0, "gloo", 2, 1, [0.0, 0.0])


@pytest.mark.tier("default")
def test_the_sum_over_two_processes() -> None:
    assert 0 < gpu.summed("gloo", 2) < 60


@pytest.mark.parametrize(("factor", "level"), [(1.0, "ok"), (1.0 + 2e-3, "FAIL"), (float("nan"), "FAIL")])
def test_a_toy_run_that_drifts(factor: float, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    see(monkeypatch, 1)
    rows = [dict(row) for row in toy.committed()]
    rows[-1]["delta"] *= factor
    monkeypatch.setattr(toy, "steps", lambda _device: rows)
    [finding] = gpu.toy_run()
    assert finding.level == level
