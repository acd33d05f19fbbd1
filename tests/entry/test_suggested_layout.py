"""The dry run's advice: the layout that it prints is accepted, trains the same student and waits less."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.entry.command import read_metrics, trained, without_seconds
from tests.entry.conftest import Toys

BUBBLE = r"bubble with 4 micro-batch\(es\): ([\d.]+)% of a step"
LAYOUT = r"([\d.]+)% with --pipeline-model-parallel-layout '([Et|L]+)'"
# Both taps and the final loss on the second of two stages. Triton's taps would be so cheap that the toy is even enough.
UNEVEN = "--fdd-layer-pairs 3:4,4:6 --fdd-kernels torch".split()


def dry_run(toy: Toys, *flags: str) -> str:
    [[ending, _]] = trained(toy.command(*UNEVEN, "--fdd-dry-run", *flags))
    return ending.out


def found(pattern: str, text: str) -> tuple[str, ...]:
    match = re.search(pattern, text)
    assert match, f"{pattern} is not in\n{text}"
    return match.groups()


def test_the_suggested_layout_works(toy: Toys, tmp_path: Path) -> None:
    two_stages = ("--pipeline-model-parallel-size", "2")
    plan = dry_run(toy, *two_stages)
    (bubble,) = found(BUBBLE, plan)
    promised, layout = found(LAYOUT, plan)
    assert layout == "Ettt|tL"
    flags = (*two_stages, "--pipeline-model-parallel-layout", layout)
    new_plan = dry_run(toy, *flags)
    (new_bubble,) = found(BUBBLE, new_plan)
    assert float(new_bubble) == float(promised) < float(bubble)
    assert "no better split" in new_plan
    assert re.search(r"stage 0: student blocks 1\.\.3, taps s3:t4", new_plan)

    one, suggested = tmp_path / "one.jsonl", tmp_path / "suggested.jsonl"
    trained(toy.command(*UNEVEN, "--fdd-metrics-file", one), ranks=1)
    trained(toy.command(*UNEVEN, "--fdd-metrics-file", suggested, *flags))
    records, wanted = (without_seconds(read_metrics(path)) for path in (suggested, one))
    assert len(wanted) == 3
    for record, other in zip(records, wanted, strict=True):
        assert record == pytest.approx(other, rel=1e-5, abs=1e-6)
