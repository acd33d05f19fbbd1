"""The benchmark of the losses: its implementations do the same work, and a tiny run ends well."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from benchmarks import linear_kl, linear_kl_steps, measure


def test_implementations_that_differ_are_noticed() -> None:
    size = linear_kl.SMOKE
    linear_kl.check({"ours": linear_kl_steps.our_objective}, size, whole=True)
    linear_kl.check(
        {"ours": linear_kl_steps.our_final, "plain": linear_kl_steps.plain_final}, size, whole=False
    )
    with pytest.raises(SystemExit, match="not the same work"):
        linear_kl.check({"final": linear_kl_steps.our_final}, size, whole=True)


def test_tiny_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with patch.object(measure, "RESULTS", tmp_path / "results"):
        assert linear_kl.main(["--smoke", "--repeats", "1", "--no-plain"]) == 0
    printed = capsys.readouterr().out
    for name in (linear_kl.FLOOR, linear_kl.OURS, linear_kl.PER_TOKEN):
        assert name in printed
    assert not (tmp_path / "results").exists(), "a trial is not recorded"


def test_peak_counts_what_a_call_allocates() -> None:
    def call() -> None:
        kept = torch.ones(2**18)
        torch.ones(2**20).add_(1)
        kept.add_(1)

    assert measure.peak_of(call) == pytest.approx(5.0, rel=0.01)


def test_no_ratio_of_unsteady_times() -> None:
    steady, unsteady = measure.summary([1.0, 1.01, 1.02], 1.0), measure.summary([1.0, 1.2, 1.1], 1.0)
    assert "unsteady" not in measure.table({"a": steady}, "a")
    assert measure.table({"a": steady, "b": unsteady}, "a").count("unsteady") == 1
    assert measure.table({"a": unsteady, "b": steady}, "a").count("unsteady") == 2
