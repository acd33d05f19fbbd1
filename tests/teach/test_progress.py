"""How far a producer is: lines in a log, a bar on a terminal, and the rate that its store remembers."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from megatron_fdd.host import console
from megatron_fdd.host.bar import hours
from megatron_fdd.teach.progress import RATE_FILE, TeachProgress, keep_rate, known_rate
from tests.data.store.made import write


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines_of(times: list[float], *, is_shown: bool = True, total: int = 10_000) -> list[str]:
    """Return the lines of a producer whose rounds of 100 tokens end at these times."""
    said: list[str] = []
    now = [0.0]
    with TeachProgress(total, is_shown=is_shown, clock=lambda: now[0], say=said.append) as progress:
        for time in times:
            now[0] = time
            progress.round(100)
    return said


def test_the_first_round_does_not_count_and_lines_come_seldom() -> None:
    # 100 tokens in 10 s; the first round took 1000 s.
    said = lines_of([1000.0 + 10 * number for number in range(65)])
    assert said == [
        "200 of 10000 tokens, 10 tokens/s, about 16 min left",
        "3200 of 10000 tokens, 10 tokens/s, about 11 min left",
        "6200 of 10000 tokens, 10 tokens/s, about 6 min left",
    ]


def test_other_ranks_and_a_single_round_say_nothing() -> None:
    assert lines_of([1.0, 2.0, 3.0], is_shown=False) == []
    assert lines_of([1.0]) == []


def test_a_terminal_has_a_bar_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(console, "terminal", lambda: terminal)
    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)  # no thread
    said = lines_of([1000.0 + 400 * number for number in range(9)])
    assert said == ["200 of 10000 tokens, 0 tokens/s, about 10.9 h left"]
    assert "teach:" in terminal.getvalue()
    assert "token/s" in terminal.getvalue()


@pytest.mark.parametrize(
    ("seconds", "told"), [(5.2, "about 5 s"), (99, "about 99 s"), (120, "about 2 min"), (7200, "about 2.0 h")]
)
def test_durations(seconds: float, told: str) -> None:
    assert hours(seconds) == told


def test_a_store_remembers_the_rate(tmp_path: Path) -> None:
    write(tmp_path)
    assert known_rate(tmp_path) is None
    keep_rate(tmp_path, 12.5)
    assert known_rate(tmp_path) == 12.5
    for text in (
        "",
        "[]",
        "{}",
        '{"tokens_per_s": "many"}',
        '{"tokens_per_s": -1.0}',
        '{"tokens_per_s": NaN}',
    ):
        (tmp_path / RATE_FILE).write_text(text)
        assert known_rate(tmp_path) is None
    keep_rate(tmp_path, 3.5)
    assert known_rate(tmp_path) == 3.5
