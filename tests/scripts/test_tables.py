"""Lines of results, and tables made from them. The lines in made-up-results.jsonl are invented."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import lines, tables

MADE_UP = Path(__file__).parent / "made-up-results.jsonl"
# The rows as in a table of docs/performance.md.
ROWS = """\
| objective of 4 layers | ms | x floor | MiB | rate |
| --- | --: | --: | --: | --: |
| bare matrix products | 1000 |  | 100 | 1 TFLOP/s |
| megatron_fdd, as in a training | 2000 | 2.00 ± 0.05 | 50 |  |
| plain torch | OutOfMemoryError: made up |  |  |  |

Objective over its products: 2.00; at most 1.5 is the bar: missed.
| FDD | 3 (spread 2%) | 1.50 | 1000 | kd 1, trajectory 2 |
| logit KD | 2 (spread 2%) | 1.00 | 900 | kd 1 |
| seconds of one step, watched | teacher | final losses |
| FDD | 1 | 0.5 |
| tp2 | 2 | float32 | hung or ended by another |  |  |
| pipeline | data parallel | failed | 20 | 5.0e-01 | 1.0e-03 |
| a rank is killed | passed | 5.0 | 0 | 1 |"""


def test_every_line_is_in_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert tables.main([str(MADE_UP)]) == 0
    printed = capsys.readouterr().out
    for row in ROWS.splitlines():
        assert row in printed
    assert ROWS.split("\n| FDD")[0] in printed
    assert "| step |" not in printed


def test_page_says_how_sections_ended_and_what_was_cut_is_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert tables.main([str(MADE_UP), "--page"]) == 0
    printed = capsys.readouterr().out
    assert "| step | cut | the time of the whole was over | 34 |" in printed
    assert "step:\n\n```\nERROR made up\n```" in printed
    assert "MADE UP, no GPU; 0 GPU; Python 3.12, torch 0.0." in printed
    assert "in the midd" not in printed


def test_a_toy_is_no_measurement(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    for line in lines.read(MADE_UP):
        kind = line.pop("kind")
        lines.write(path, kind, line | {"device": "cpu"})
    page = tables.page(lines.read(path), "made up")
    assert page.count(tables.NO_FIGURES) >= 3
    assert "is the bar" not in page


def test_needs_python_alone() -> None:
    program = f"import sys; from benchmarks import tables; tables.main(['{MADE_UP}']); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


SIZE = {"seq_length": 8, "micro_batch_size": 1, "micro_batches": 1, "vocab_size": 8}
SIZE |= {f"{whose}_{what}": 4 for whose in ("teacher", "student") for what in ("layers", "width")}
COST: dict[str, object] = {"spread": 0.0, "whole_mib": 1, "losses": {}, "parts": {}}
STEP: dict[str, object] = {"size": SIZE, "machine": "made up", "flags": "", **COST}


def write_step(path: Path, device: str, date: str, objective: str, seconds: float) -> None:
    row = {"device": device, "date": date, "objective": objective, "seconds": seconds}
    lines.write(path, "step", STEP | row)


@pytest.mark.tier("fast")
def test_a_table_has_rows_of_one_run_and_one_device(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    write_step(path, "cuda", "1st", "FDD", 6)
    write_step(path, "cuda", "1st", "logit KD", 3)
    write_step(path, "cpu", "2nd", "logit KD", 1)
    write_step(path, "cuda", "3rd", "FDD", 9)
    for device, ending in (("cuda", "begun"), ("cpu", "passed"), ("cuda", "passed")):
        lines.write(
            path, "layout", {"device": device, "name": "tp2", "ranks": 2, "bf16": False, "ending": ending}
        )
    printed = tables.tables(lines.read(path))
    assert [line for line in printed.splitlines() if line.startswith(("| FDD", "| logit"))] == [
        "| FDD | 9 (spread 0%) |  | 1 |  |",
        "| logit KD | 1 (spread 0%) | 1.00 | 1 |  |",
    ]
    assert printed.count("| tp2 | 2 | float32 | passed |") == 2
    assert "begun" not in printed
    assert ("| layout on cpu |" in printed, "| layout on cuda |" in printed) == (True, True)


@pytest.mark.tier("fast")
def test_a_file_without_tables_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lines").write_text('{"benchmark": "of another kind"}\n')
    with pytest.raises(SystemExit, match="2"):
        tables.main([str(tmp_path / "lines")])
    assert "no lines that a table is made of" in capsys.readouterr().err.splitlines()[-1]
