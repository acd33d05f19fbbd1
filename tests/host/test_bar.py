"""Progress in a pipe: no bar, and a line now and then."""

from __future__ import annotations

import pytest

from megatron_fdd.host import bar as bar_module
from megatron_fdd.host.bar import Bar
from tests.data.stream.made import Hand


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Hand:
    hand = Hand()
    monkeypatch.setattr(bar_module.time, "monotonic", hand)
    return hand


def test_a_pipe_gets_a_line_a_minute(clock: Hand, capsys: pytest.CaptureFixture[str]) -> None:
    with Bar(total=4_000_000, desc="writing", unit="B", initial=1_000_000) as bar:
        for _ in range(6):
            clock.now_s += 25
            bar.update(500_000)
    assert capsys.readouterr().err == (
        "writing: 2.5 MB of 4 MB, about 75 s left\nwriting: 4 MB of 4 MB, about 0 s left\n"
    )


def test_other_ranks_are_silent(clock: Hand, capsys: pytest.CaptureFixture[str]) -> None:
    with Bar(total=4, desc="units", unit="sample", is_shown=False) as bar:
        clock.now_s += 1000
        bar.update()
    assert capsys.readouterr().err == ""


def test_units_are_counted(clock: Hand, capsys: pytest.CaptureFixture[str]) -> None:
    with Bar(total=4, desc="checking", unit="segment") as bar:
        clock.now_s += 300
        bar.update()
    assert capsys.readouterr().err == "checking: 1 segments of 4 segments, about 15 min left\n"
