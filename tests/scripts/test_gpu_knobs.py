"""tests/gpu/run.sh and multi.sh: wrong values and folders, and where a call continues. Nothing is started."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from benchmarks import lines, measure
from tests.gpu import knobs as knobs_module
from tests.gpu import layouts, multi, run
from tests.gpu.knobs import Knobs, RefusedError, refuse_absent_gpus
from tests.gpu.sections import Runner, Section, uninterrupted

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.tier("fast")


@pytest.fixture(autouse=True)
def no_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let neither git nor nvidia-smi be asked."""
    monkeypatch.setattr(run, "commit", lambda: "")
    monkeypatch.setattr(run, "gpus", lambda _: "")


def values(out: Path, **changed: str) -> dict[str, str]:
    """Return the environment that the scripts make."""
    common = {"DEVICE": "cpu", "PART": "1", "BUDGET_S": "60", "FRESH": "0", "RETRY": "0", "WORKERS": "1"}
    return {**common, "WHEELS": "", "OUT": str(out), "STATE": str(out), **changed}


def knobs(out: Path, **changed: str) -> Knobs:
    return Knobs.read(values(out, **changed))


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("BUDGET_S", "x", "BUDGET_S=x: must be a number of seconds above 0"),
        ("BUDGET_S", "inf", "BUDGET_S=inf: must be a number of seconds above 0"),
        ("PART", "3", "PART=3: must be 1 or 2"),
        ("FRESH", "yes", "FRESH=yes: must be 0 or 1"),
        ("RETRY", "yes", "RETRY=yes: must be 0 or 1"),
        ("DEVICE", "gpu", "DEVICE=gpu: must be cpu or cuda"),
        ("GPUS", "abc", "GPUS=abc: must be a whole number of at least 1"),
        ("GPUS", "0", "GPUS=0: must be a whole number of at least 1"),
        ("WORKERS", "-1", "WORKERS=-1: must be a whole number of at least 1"),
        ("WHEELS", "/nonexistent", "WHEELS=/nonexistent: must be a folder with wheels (*.whl)"),
        ("WHEELS", str(Path(__file__).parent), "must be a folder with wheels (*.whl)"),
        ("OUT", f"{__file__}/in-a-file", "cannot be written"),
    ],
)
def test_odd_values_are_refused_in_one_line(
    name: str,
    value: str,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for each in values(tmp_path / "out", **{name: value}).items():
        monkeypatch.setenv(*each)
    monkeypatch.setattr(run, "SIGNALS", ())
    monkeypatch.setattr(run, "conduct", lambda *_: pytest.fail("it has begun"))
    assert run.main("made up", run.sections) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert told in line
    assert not (tmp_path / "out").exists()


def test_gpus_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    refuse_absent_gpus(knobs(tmp_path, DEVICE="cuda", GPUS="2"))
    with pytest.raises(RefusedError, match="GPUS=3: torch sees 2"):
        refuse_absent_gpus(knobs(tmp_path, DEVICE="cuda", GPUS="3"))
    assert [multi.num_ranks(knobs(tmp_path, DEVICE="cuda", GPUS=gpus)) for gpus in ("1", "")] == [1, 2]
    on_cpu = knobs(tmp_path, GPUS="3")
    assert multi.num_ranks(on_cpu) == 2
    refuse_absent_gpus(on_cpu)
    assert capsys.readouterr().out == "GPUS=3 is not used with DEVICE=cpu\n"


def test_results_of_another_device_or_commit_are_put_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results.jsonl"
    monkeypatch.setattr(run, "commit", lambda: "aaa")
    run.prepare(knobs(tmp_path), results)
    lines.write(results, "section", {"name": "losses", "ending": "passed"})
    run.prepare(knobs(tmp_path, PART="2"), results)
    assert len(lines.read(results, "section")) == 1, "the same device and commit goes on"
    assert not capsys.readouterr().out
    for number, (device, commit) in enumerate((("cuda", "aaa"), ("cuda", "bbb"))):
        monkeypatch.setattr(run, "commit", lambda commit=commit: commit)
        monkeypatch.setattr(time, "strftime", lambda _, number=number: f"results-{number}.jsonl")
        run.prepare(knobs(tmp_path, PART="2", DEVICE=device), results)
        assert "all begins anew" in capsys.readouterr().out
        (line,) = lines.read(results)
        assert (line["kind"], line["device"], line["commit"]) == ("call", device, commit)
    assert lines.read(tmp_path / "results-0.jsonl", "section")[0]["ending"] == "passed"


def test_results_of_another_gpu_are_put_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "results.jsonl"
    for name in ("H200", "H100"):
        monkeypatch.setattr(run, "gpus", lambda _, name=name: name)
        run.prepare(knobs(tmp_path, DEVICE="cuda"), results)
        assert [line["gpus"] for line in lines.read(results)] == [name]


@pytest.mark.tier("default")
def test_after_a_mend_what_failed_is_tried_again_and_what_passed_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "results.jsonl"
    for tree in ("aaa", "aaa+12345678"):
        monkeypatch.setattr(run, "commit", lambda tree=tree: tree)
        run.prepare(knobs(tmp_path, RETRY="1"), results)
    assert [line["commit"] for line in lines.read(results)] == ["aaa", "aaa+12345678"]
    for name, ending in (("good", "passed"), ("bad", "failed"), ("slow", "hung")):
        lines.write(results, "section", {"name": name, "ending": ending, "why": ""})
    sections = [Section(name, ("true",), 60) for name in ("good", "bad", "slow")]
    assert not Runner(tmp_path, time.monotonic() + 60, "made up").run(sections)
    assert Runner(tmp_path, time.monotonic() + 60, "made up", retries=True).run(sections)
    ended = [line["name"] for line in lines.read(results, "section")]
    assert ended == ["good", "bad", "slow", "bad", "slow"]


def test_a_first_part_in_an_empty_folder_overwrites_nothing(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    (state / "results.jsonl").write_text("what an earlier call has measured\n")
    run.prepare(knobs(tmp_path, STATE=str(state)), tmp_path / "results.jsonl")
    (kept,) = state.iterdir()
    assert kept.name.startswith("results-")
    assert kept.read_text() == "what an earlier call has measured\n"


def test_a_change_since_the_commit_is_part_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed: dict[str, bytes] = {"rev-parse": b"abc\n"}
    monkeypatch.setattr(knobs_module, "_said_by", lambda *command: changed.get(command[1], b""))
    monkeypatch.setattr(knobs_module.shutil, "which", lambda _: "git")
    assert knobs_module.commit() == "abc"
    (tmp_path / "new.py").write_text("new")
    names = []
    for output in ({"diff": b"-old"}, {"ls-files": bytes(tmp_path / "new.py") + b"\0"}):
        changed.update(output)
        names.append(knobs_module.commit())
    assert all(name.startswith("abc+") for name in names)
    assert names[0] != names[1]


def test_a_wheel_that_pip_refuses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "SITE", tmp_path / "site")
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    with pytest.raises(RefusedError, match="pip cannot install them"):
        run.install([tmp_path / "bad-1-py3-none-any.whl"])


def test_an_earlier_ending_does_not_count_for_a_section_that_is_cut_now(tmp_path: Path) -> None:
    lacking = Section("kernels", ("true",), 60, missing="ncu is not on PATH")
    assert Runner(tmp_path, time.monotonic() + 60, "made up").run([lacking])
    late = Runner(tmp_path, time.monotonic() + 5, "made up")
    assert not late.run([Section("kernels", ("true",), 60, least_s=20)])
    assert late.ended == {"kernels": "cut"}


def test_a_copy_that_fails_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runner = Runner(tmp_path, time.monotonic() + 60, "made up", copy=Path(__file__) / "in-a-file")
    assert runner.run([Section(name, ("true",), 60, missing="made up") for name in ("first", "second")])
    assert capsys.readouterr().out.count("warning: STATE=") == 1
    assert "| second | skipped |" in (tmp_path / "results.md").read_text()


def test_fresh_forgets_and_a_folder_for_copies_that_cannot_be_read_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results.jsonl"
    results.write_text("{}\n")
    run.prepare(knobs(tmp_path, FRESH="1", STATE=f"{__file__}/in-a-file"), results)
    assert "warning: STATE=" in capsys.readouterr().out
    assert [line["kind"] for line in lines.read(results)] == ["call"]


def test_a_line_that_was_cut_off_takes_no_other_with_it(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    lines.write(path, "first", {"number": 1})
    with path.open("ab") as file:
        file.write(b'[1]\n"text"\n\xff\xfe\n\0\0\0\n{"kind": "hal\xc3')
    lines.write(path, "last", {"number": 2})
    lines.write(path, "last", {"number": 3})
    assert [line["number"] for line in lines.read(path)] == [1, 2, 3]
    assert path.read_bytes().count(b"\n\n") == 0


def test_a_layout_that_was_cut_off_is_begun_again(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    about = {"ranks": 2, "bf16": False, "device": "cpu"}
    lines.write(path, "layout", {"name": "tp2-sp", "ending": "passed", **about})
    lines.write(path, "layout", {"name": "cp2", "ending": layouts.BEGUN, **about})
    assert layouts.to_do(2, "cpu", path) == ["pp2-vpp3", "cp2", "ep2"]
    layouts.give_up(2, "cpu", path)
    assert layouts.to_do(2, "cpu", path) == ["pp2-vpp3", "ep2"], "within a call it is not"


def test_a_signal_waits_until_what_starts_is_known() -> None:
    known = []

    def start() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            known.append("process")

    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell ignores it for what it runs behind
    try:
        with pytest.raises(KeyboardInterrupt):
            start()
    finally:
        signal.signal(signal.SIGINT, before)
    assert known == ["process"]


def test_a_process_dates_its_rows_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    first = measure.origin()
    monkeypatch.setattr(measure, "datetime", None)
    assert measure.origin() == first


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with run.alone_in(tmp_path), pytest.raises(RefusedError, match="another run"), run.alone_in(tmp_path):
        pass
    with run.alone_in(tmp_path):
        assert os.listdir(tmp_path) == ["lock"]


def test_the_sections_are_commands_that_exist(tmp_path: Path) -> None:
    """The modules and test files exist, also those that need a GPU."""
    for section in run.sections(knobs(tmp_path, DEVICE="cuda"), tmp_path / "lines", has_te=True):
        for word in section.command:
            if word.startswith("tests/"):
                assert (ROOT / word).exists()
            elif word.startswith(("tests.", "benchmarks.")):
                assert (ROOT / f"{word.replace('.', '/')}.py").exists()
