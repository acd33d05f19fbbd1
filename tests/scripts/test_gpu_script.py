"""tests/gpu/run.sh without a GPU: from end to end on a CPU at toy sizes, and its handling of endings."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks import lines, tables
from tests.gpu import run
from tests.gpu.sections import Runner, Section

ROOT = Path(__file__).parents[2]


def call(out: Path, **environment: str) -> tuple[int, str]:
    """Return the exit status and the output."""
    environment = {"OUT": str(out), "STATE": str(out), **environment}
    result = subprocess.run(
        ["bash", str(ROOT / "tests/gpu/run.sh")],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    return result.returncode, result.stdout


def endings(out: Path) -> Mapping[str, str]:
    return {line["name"]: line["ending"] for line in lines.read(out / "results.jsonl", "section")}


def test_on_a_cpu_from_end_to_end(tmp_path: Path) -> None:
    status, printed = call(tmp_path, DEVICE="cpu", PART="1")
    assert status == 0, printed[printed.rindex("\nresults:") :] + printed
    ended = endings(tmp_path)
    for name in ("machine", "losses", "operations", "small-runs", "step"):
        assert ended[name] == "passed", printed
    assert {name for name, ending in ended.items() if ending == "skipped"} >= {
        "step-fp8",
        "kernels",
        "memory-checks",
    }
    groups = {line["group"] for line in lines.read(tmp_path / "results.jsonl", "loss")}
    assert {"ceilings", "one layer's divergence", "final logits", "delta", "others"} <= groups
    steps = lines.read(tmp_path / "results.jsonl", "step")
    assert [line["objective"] for line in steps] == ["FDD", "logit KD"]
    assert set(steps[0]["losses"]) == {"ce", "kd", "trajectory", "delta"}
    assert min(steps[0]["parts"].values()) > 0
    page = (tmp_path / "results.md").read_text()
    assert tables.tables(lines.read(tmp_path / "results.jsonl")) in page
    assert tables.NO_FIGURES in page
    assert page.startswith("# Rehearsal on a CPU: GPU results, part 1\n")
    before = (tmp_path / "results.jsonl").read_text()
    status, printed = call(tmp_path, DEVICE="cpu", PART="2")
    assert status == 0, printed
    assert "== losses: passed before" in printed
    assert (tmp_path / "results.jsonl").read_text().startswith(before)
    assert len(lines.read(tmp_path / "results.jsonl", "step")) == 2, "nothing is done twice"
    assert {path.name for path in tmp_path.iterdir()} == {"results.jsonl", "results.md", "log.txt", "lock"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_at_once(tmp_path: Path) -> None:
    status, _ = call(tmp_path, DEVICE="cuda")
    assert status == 1
    assert endings(tmp_path)["machine"] == "failed"
    assert "losses" not in endings(tmp_path)
    assert "error: torch sees no GPU" in (tmp_path / "results.md").read_text()


def bash(name: str, script: str, limit_s: float = 20, **options: object) -> Section:
    return Section(name, ("bash", "-c", script), limit_s, **options)  # type: ignore[arg-type]


def runner(out: Path, budget_s: float, part: str = "1") -> Runner:
    out.mkdir(exist_ok=True)
    return Runner(out, time.monotonic() + budget_s, "made up", part, copy=out.parent / "copy")


def ends(pid: int) -> bool:
    """Whether a killed process is gone soon; a zombie counts as gone."""
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        time.sleep(0.05)
    return not psutil.pid_exists(pid)


def test_every_ending_is_told_and_the_rest_is_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    child = tmp_path / "child"
    sections = [
        bash("good", "echo fine"),
        bash("bad", "echo FAILED tests/made_up.py; exit 3"),
        bash("slow", f"setsid sleep 60 & echo $! >{child}; wait", limit_s=0.5),
        bash("beside-it", "echo meanwhile", beside=True),
        bash("lacking", "echo never", missing="made-up-program is not on PATH"),
        bash("last", "echo last"),
    ]
    ours = runner(out, 30)
    assert not ours.run(sections)
    assert ours.misses() == [
        "-- bad: failed status 3",
        "FAILED tests/made_up.py",
        "-- slow: hung longer than its 0 s",
    ]
    assert endings(out) == {
        "good": "passed",
        "bad": "failed",
        "beside-it": "passed",
        "slow": "hung",
        "lacking": "skipped",
        "last": "passed",
    }
    assert ends(int(child.read_text())), "what a section has started ends with it"
    page = (out / "results.md").read_text()
    assert "| bad | failed | status 3 |" in page
    assert "FAILED tests/made_up.py" in page
    assert "made-up-program is not on PATH" in page
    assert (tmp_path / "copy" / "results.md").read_text() == page
    assert "fine" in (out / "log.txt").read_text()


def test_a_second_call_goes_on_where_the_first_was_cut_off(tmp_path: Path) -> None:
    count = tmp_path / "count"
    sections = [
        bash("first", f"echo x >>{count}"),
        bash("cut", f"[[ -e {tmp_path}/again ]] || sleep 60"),
        bash("after", "true", least_s=5),
    ]
    assert not runner(tmp_path / "out", 1.5).run(sections)
    assert endings(tmp_path / "out") == {"first": "passed", "cut": "cut", "after": "cut"}
    (tmp_path / "again").touch()
    assert runner(tmp_path / "out", 30, "2").run(sections)
    assert set(endings(tmp_path / "out").values()) == {"passed"}
    assert count.read_text() == "x\n"


PROGRAM = """
import os, signal, sys, time
from pathlib import Path
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where these tests were started by nohup
from tests.gpu import run
os.environ |= {"BUDGET_S": "60", "DEVICE": "cpu", "PART": "1", "FRESH": "0", "RETRY": "0", "WHEELS": ""}
os.environ |= {"OUT": sys.argv[1], "STATE": sys.argv[1], "WORKERS": "1"}
long = run.Section("machine", ("sleep", "60"), 60)
run.beginnings = lambda *_: [long]
sys.exit(run.main("made up", lambda *_: []))
"""


def start_program(out: Path) -> subprocess.Popen[str]:
    """Start a run, and return when its first section has begun."""
    command = [sys.executable, "-c", PROGRAM, str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (out / "machine.log").exists():
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_script_leaves_its_page(tmp_path: Path, number: signal.Signals) -> None:
    process = start_program(tmp_path)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert "Traceback" not in printed
    told = f"interrupted; the same command goes on; results so far: {tmp_path}/results.md"
    assert printed.splitlines()[-1] == told
    assert "| machine | cut | the run was stopped |" in (tmp_path / "results.md").read_text()


def test_when_the_terminal_is_gone_the_page_is_left(tmp_path: Path) -> None:
    """It is like a lost ssh connection: SIGHUP, and nobody reads the output."""
    process = start_program(tmp_path)
    assert process.stdout is not None
    process.stdout.close()
    process.send_signal(signal.SIGHUP)
    assert process.wait(20) == 128 + signal.SIGHUP
    assert "| machine | cut | the run was stopped |" in (tmp_path / "results.md").read_text()


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    first = start_program(tmp_path)
    status, printed = call(tmp_path, DEVICE="cpu")
    first.terminate()
    first.communicate(timeout=20)
    assert status == 2
    assert printed == f"error: OUT={tmp_path}: another run writes there; wait for it, or set OUT\n"


@pytest.mark.tier("default")
def test_on_a_full_disk_nothing_is_left_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("made up: no space left")

    monkeypatch.setattr(lines, "write", fail)
    children = [tmp_path / "first", tmp_path / "second"]
    waiting = [bash(child.name, f"echo $$ >{child}; exec sleep 60", beside=True) for child in children]
    both = " && ".join(f"[[ -s {child} ]]" for child in children)
    ending = bash("ends", f"until {both}; do sleep 0.05; done", beside=True)
    with pytest.raises(OSError, match="made up"):
        runner(tmp_path / "out", 30).run([*waiting, ending])
    assert all(ends(int(child.read_text())) for child in children)


@pytest.mark.tier("default")
def test_a_log_that_is_gone_is_no_error(tmp_path: Path) -> None:
    assert runner(tmp_path / "out", 30).run([bash("removes", f"rm {tmp_path}/out/removes.log")])


def test_a_broken_transformer_engine_is_as_if_it_were_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "transformer_engine.py").write_text("raise OSError('made up')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setattr(run, "SITE", tmp_path / "site")
    monkeypatch.setattr(sys, "path", list(sys.path))
    run.hide_transformer_engine()
    program = "from tests.gpu import te_is_there; assert not te_is_there()"
    subprocess.run([sys.executable, "-c", program], check=True)
