"""The loss curves: which numbers of a metrics file are drawn, and where."""

import json
import math
from pathlib import Path

import pytest

from megatron_fdd.evaluate.plot import plot_metrics, read_records, sort_into_panels

RECORDS = [
    {"iteration": 1, "tokens": 8, "kd": 2.0, "trajectory s3:t6": 4.0, "grad_norm": None, "seconds": 1.0},
    {"iteration": 2, "tokens": 8, "kd": 1.0, "trajectory/s3:t6": 3.0, "grad_norm": 5.0, "valid kd": 1.5},
]


def write(path: Path, records: list[dict], tail: str = "") -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return path


def test_terms_are_sorted_into_panels() -> None:
    panels = sort_into_panels(RECORDS)
    assert list(panels) == ["kd", "trajectory", "grad_norm"]
    assert panels["kd"].training[""].values == [2.0, 1.0]
    assert panels["kd"].validation[""].iterations == [2]
    assert panels["trajectory"].training["s3:t6"].values == [4.0, 3.0]
    assert math.isnan(panels["grad_norm"].training[""].values[0])


def test_a_png_is_written_although_the_last_line_is_unfinished(tmp_path: Path) -> None:
    metrics = write(tmp_path / "metrics.jsonl", RECORDS, '{"itera')
    assert plot_metrics(metrics, tmp_path / "new" / "losses.png") == 3
    assert (tmp_path / "new" / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_no_metrics_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="line 1: malformed JSON"):
        read_records(write(tmp_path / "broken", RECORDS[1:] * 0, "oops\n{}\n"))
    with pytest.raises(ValueError, match="no finished record"):
        read_records(write(tmp_path / "empty", []))
    with pytest.raises(ValueError, match="is it a metrics file"):
        plot_metrics(write(tmp_path / "other", [{"iteration": 1, "speed": 2}]), tmp_path / "out.png")
