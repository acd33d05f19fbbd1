"""The report's runs: what is read, and how it is summed up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_fdd.evaluate.report.facts import run_facts
from megatron_fdd.evaluate.report.heat_maps import draw_heat_map, make_heat_map
from megatron_fdd.evaluate.report.metrics import Curve, bin_width, cut_into_bins, in_digits, read_metrics
from megatron_fdd.evaluate.report.panels import draw_teachers
from megatron_fdd.evaluate.report.runs import read_runs
from megatron_fdd.evaluate.report.terms import kinds_of
from tests.evaluate.report_files import PAIRS, make_run, record, write, write_evaluation


def test_metrics_become_curves(tmp_path: Path) -> None:
    lines = [record(1), record(2, kd=None, grad_norm=float("nan")), {"iteration": 2, "valid kd": 1.5}]
    metrics = read_metrics(write(tmp_path / "metrics.jsonl", lines, '{"itera'))
    assert (metrics.first, metrics.last, metrics.is_cut) == (1, 2, True)
    assert metrics.curves["kd"].values.tolist() == [1.0]
    assert metrics.curves["grad_norm"].iterations.tolist() == [1]
    assert metrics.curves["valid kd"].iterations.tolist() == [2]
    assert read_metrics(write(tmp_path / "metrics.jsonl", [record(0), record(1)])).first == 0
    assert metrics.curves["tokens per second"].values.tolist() == [200.0, 200.0]
    assert "ce" not in metrics.curves
    assert metrics.layer_pairs("trajectory") == list(PAIRS)
    own = {"kd code": 1.0, f"trajectory {PAIRS[0]} code": 1.0}
    metrics = read_metrics(write(tmp_path / "metrics.jsonl", [record(0) | own]))
    assert (metrics.layer_pairs("trajectory"), metrics.layer_pairs("kd")) == (list(PAIRS), [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('oops\n{"iteration": 1}\n', "line 1: malformed JSON"),
        ("", "no finished record"),
        ('{"iter', "no finished record"),
        ('{"iteration": 1, "speed": 2}\n', "is it a metrics file"),
        ("[1]\n", 'line 1: not an object with an "iteration"'),
        ('{"iteration": 2, "kd": 1}\n{"iteration": 1, "kd": 1}\n', "line 2: iteration 1 comes after 2"),
    ],
)
def test_what_is_no_metrics_file_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_runs([str(tmp_path)])


def test_a_checkpoint_that_is_gone_is_a_remark(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    assert not read_runs([str(tmp_path / "run")])[0].remarks
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("7")
    [run] = read_runs([str(tmp_path / "run")])
    assert "iter_0000007" in run.remarks[0]


def test_a_run_is_a_folder_a_file_or_joined_from_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "one")
    write_evaluation(tmp_path / "one/evaluation/any name")
    write(tmp_path / "other.jsonl", [record(1)])
    write(tmp_path / "lr=1/metrics.jsonl", [record(1)])
    write_evaluation(tmp_path / "scores")
    monkeypatch.chdir(tmp_path)
    runs = read_runs(["one", "other.jsonl", "x=lr=1/metrics.jsonl", "lr=1", "other=scores", "y=scores/"])
    assert [run.name for run in runs] == ["one", "other", "x", "lr=1", "y"]
    assert [run.number for run in runs] == [0, 1, 2, 3, 4]
    assert [run.metrics is not None for run in runs] == [True, True, True, True, False]
    assert [run.evaluation is not None for run in runs] == [True, True, False, False, True]


def test_the_evaluation_of_the_runs_name_is_taken(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    for name in ("before", "after"):
        write_evaluation(tmp_path / "run/evaluation" / name, model=name)
    [run] = read_runs([f"after={tmp_path}/run"])
    assert run.evaluation is not None
    assert run.evaluation["model"] == "after"
    with pytest.raises(ValueError, match="none is called 'run': name the run after one of after, before"):
        read_runs([f"{tmp_path}/run"])


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds neither metrics\.jsonl nor evaluation\.json"):
        read_runs([str(tmp_path / "empty")])
    with pytest.raises(ValueError, match="missing: no such file or folder"):
        read_runs([str(tmp_path / "missing")])
    for folder in ("a/run", "b/run"):
        make_run(tmp_path / folder)
    with pytest.raises(ValueError, match="'run' has metrics at .*a/run/.* and at .*b/run/.*NAME=PATH"):
        read_runs([str(tmp_path / "a/run"), str(tmp_path / "b/run")])
    write_evaluation(tmp_path / "old")
    (tmp_path / "old/evaluation.json").write_text('{"version": 9}')
    with pytest.raises(ValueError, match="not an evaluation of version 1"):
        read_runs([str(tmp_path / "old")])


def test_a_path_with_an_equals_sign_is_no_name(tmp_path: Path) -> None:
    run = make_run(tmp_path / "lr=5e-4")
    assert [each.name for each in read_runs([str(run), f"a={run}"])] == ["lr=5e-4", "a"]
    with pytest.raises(ValueError, match=rf"^{tmp_path}/lr=1: no such file or folder"):
        read_runs([f"{tmp_path}/lr=1"])


def test_bins_are_means_with_their_extremes() -> None:
    curve = Curve(np.array([1, 2, 3, 7]), np.array([1.0, 3.0, 5.0, 7.0]))
    bins = cut_into_bins(curve, 3)
    assert bins.index.tolist() == [0, 2]  # there is nothing from 4 to 6
    assert bins.centre.tolist() == [2, 7]
    assert bins.mean.tolist() == [3, 7]
    assert (bins.lowest.tolist(), bins.highest.tolist()) == ([1, 7], [5, 7])
    assert cut_into_bins(curve, 1).mean.tolist() == curve.values.tolist()
    assert (bin_width(150, 150), bin_width(151, 150)) == (1, 2)


def test_heat_map_rows_are_pairs_and_columns_iterations(tmp_path: Path) -> None:
    [run] = read_runs([str(make_run(tmp_path / "run", 5))])
    heat_map = make_heat_map(run, "trajectory", 2)
    assert heat_map.pairs == list(PAIRS)
    assert heat_map.values.tolist() == [[1.5, 3.5, 5.0], [3.0, 3.0, 3.0]]
    assert heat_map.edges.tolist() == [0.5, 2.5, 4.5, 5.5]


def test_steps_that_draw_one_tap_fill_wider_cells(tmp_path: Path) -> None:
    lines = [record(i, **{f"trajectory {PAIRS[i % 2]}": None}) for i in range(1, 65)]
    write(tmp_path / "run/metrics.jsonl", lines)
    [run] = read_runs([str(tmp_path / "run")])
    assert np.isnan(make_heat_map(run, "trajectory", 1).values).mean() == 0.5
    picture = draw_heat_map([run], next(kind for kind in kinds_of([run]) if kind.name == "trajectory"))
    assert picture is not None
    assert "mean of 2 iterations" in picture.caption
    assert "(one drawn a step)" in dict(run_facts([run]))["layer pairs, student : teacher"][0]


def test_numbers_for_people() -> None:
    assert [in_digits(value) for value in (8054.8, 143.0, 0.6, 0.0, 123456.7, 1e-7)] == [
        "8055", "143.0", "0.6000", "0", "123,457", "1e-07",
    ]  # fmt: skip


def test_each_of_several_teachers_has_its_terms(tmp_path: Path) -> None:
    own = {"total code": 2.0, "kd code": 1.0, "total maths": 4.0, "valid total maths": 3.0}
    make_run(tmp_path / "one")
    write(tmp_path / "two" / "metrics.jsonl", [record(1) | own, record(2) | own | {"total code": None}])
    runs = read_runs([str(tmp_path / "one"), str(tmp_path / "two")])
    assert draw_teachers(runs[:1]) is None
    picture = draw_teachers(runs)
    assert picture is not None
    assert picture.alternative.endswith(
        "Last total code: two 2.000. Last total maths: two 4.000. Last kd code: two 1.000."
    )
