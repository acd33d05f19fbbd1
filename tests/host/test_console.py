"""What reaches the terminal and what the log, in a process that divides them, whichever way it prints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_fdd.host import console

pytestmark = pytest.mark.tier("default")

# A small stand-in for a rank: it prints in every way, before and after there is a log.
RANK = """
import logging, os, subprocess, sys, warnings
from pathlib import Path
early = logging.StreamHandler()  # holds the stream of before
from megatron_fdd.host import console
console.divide()
logging.getLogger().addHandler(early)
print("python: before")
folder = Path(sys.argv[1])
log = console.keep_log(folder)
console.say(f"named: {log}")
print("python: after")
os.write(1, b"descriptor 1\\n")
os.write(2, b"descriptor 2\\n")
subprocess.run(["echo", "a child"])
logging.warning("a handler")
warnings.warn("of others")
warnings.warn_explicit("of ours", UserWarning, str(Path(console.__file__).parents[1] / "plan/run.py"), 1)
for line in range(100):
    print("line", line)
exec(sys.argv[2])
"""
PRINTED = ["python: before", "python: after", "descriptor 1", "descriptor 2", "a child", "a handler"]


def rank(folder: Path, last_words: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the program above as a rank, with its log in `folder`."""
    return subprocess.run(
        [sys.executable, "-c", RANK, str(folder), last_words],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_terminal_has_our_lines_alone_and_the_log_everything(tmp_path: Path) -> None:
    done = rank(tmp_path / "logs")
    assert (done.returncode, done.stdout) == (0, f"named: {tmp_path}/logs/rank0.log\n")
    assert done.stderr == "megatron_fdd: warning: of ours\n"
    log = (tmp_path / "logs/rank0.log").read_text()
    places = [log.index(text) for text in [*PRINTED, "UserWarning: of others", "of ours", "line 99"]]
    assert places == sorted(places)
    rank(tmp_path / "logs")
    both = (tmp_path / "logs/rank0.log").read_text()
    assert both.startswith(log)
    assert both.count("python: before") == 2


def test_only_rank_0_says_something_and_each_rank_has_its_log(tmp_path: Path) -> None:
    done = rank(tmp_path, RANK="1")
    assert done.stdout == ""
    log = (tmp_path / "rank1.log").read_text()
    assert "python: after" in log
    assert "named" not in log
    assert not (tmp_path / "rank0.log").exists()


def test_a_crash_is_named_first_and_then_the_end_of_the_log(tmp_path: Path) -> None:
    done = rank(tmp_path, "raise RuntimeError('no more\\nmemory')", RANK="1")
    assert done.returncode == 1
    lines = done.stderr.splitlines()[1:]  # after the warning
    assert lines[0] == "megatron_fdd: rank 1 failed: RuntimeError: no more"
    assert lines[1] == f"The last lines of {tmp_path}/rank1.log:"
    assert len(lines) == 2 + console.TAIL_LINES
    assert lines[-2:] == ["    RuntimeError: no more", "    memory"]
    assert "    line 99" in lines
    assert "    Traceback (most recent call last):" in lines


def test_a_crash_of_a_process_group_shows_its_traceback(tmp_path: Path) -> None:
    """torch then calls our hook from its own hook, with another stderr."""
    init = f"import torch.distributed as dist; dist.init_process_group('gloo', init_method='file://{tmp_path}/meet', "
    done = rank(tmp_path, f"{init}rank=0, world_size=1)\nraise RuntimeError('no more')")
    lines = done.stderr.splitlines()
    assert "megatron_fdd: rank 0 failed: RuntimeError: no more" in lines
    assert lines[-1] == "    RuntimeError: no more"
    assert "    Traceback (most recent call last):" in lines


def test_a_crash_in_a_forked_process_is_in_the_log_alone(tmp_path: Path) -> None:
    """multiprocessing calls the hook for a thread of a data reader whose parent has ended."""
    fork = "import os, sys, warnings; warnings.simplefilter('ignore'); child = os.fork()\n"
    crash = "try:\n  1 / 0\n except ZeroDivisionError:\n  sys.excepthook(*sys.exc_info())\n os._exit(0)\n"
    done = rank(tmp_path, f"{fork}if child == 0:\n {crash}os.waitpid(child, 0)")
    assert "failed" not in done.stderr
    assert "ZeroDivisionError" in (tmp_path / "rank0.log").read_text()


def test_a_reader_that_goes_away_ends_nothing(tmp_path: Path) -> None:
    more = (
        "import os; read, write = os.pipe(); os.close(read); os.dup2(write, console._divided.out.fileno())\n"
    )
    done = rank(tmp_path, f"{more}console.say('unheard'); console.say('too')\nprint('still here')")
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "rank0.log").read_text()
    assert log.index("unheard") < log.index("too") < log.index("still here")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_below_the_terminals_file_is_told_once(tmp_path: Path) -> None:
    full = "import os; os.dup2(os.open('/dev/full', os.O_WRONLY), console._divided.out.fileno())\n"
    done = rank(tmp_path, f"{full}console.say('unheard'); console.say('too')\nprint('still here')")
    assert done.returncode == 0
    [line] = [line for line in done.stderr.splitlines() if "stdout" in line]
    assert line == (
        "megatron_fdd: warning: stdout cannot be written any more (No space left on device); see "
        f"{tmp_path / 'rank0.log'} instead"
    )
    log = (tmp_path / "rank0.log").read_text()
    assert log.index("unheard") < log.index("too") < log.index("still here")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_below_the_log_hides_nothing_from_the_terminal(tmp_path: Path) -> None:
    full = "import os; full = os.open('/dev/full', os.O_WRONLY); os.dup2(full, 1); os.dup2(full, 2)\n"
    more = "console._divided.log = os.fdopen(full, 'r+b', buffering=0)\n"
    done = rank(tmp_path, f"{full}{more}console.say('heard')\nraise RuntimeError('no more')")
    assert done.stdout.endswith("heard\n")
    assert "megatron_fdd: rank 0 failed: RuntimeError: no more" in done.stderr


# A rank whose error comes before there is a log.
EARLY = """
from megatron_fdd.host import console
console.divide()
print("before")
try:
    1 / 0
except ZeroDivisionError:
    console.complain(f"kept in {console.keep_traceback()}")
"""


def test_a_traceback_before_the_log_is_kept(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", EARLY],
        env={**os.environ, "TMPDIR": str(tmp_path), "RANK": "3"},
        capture_output=True,
        text=True,
        check=True,
    )
    [kept] = tmp_path.glob("megatron_fdd-*/rank3.log")
    assert (done.stdout, done.stderr) == ("", f"kept in {kept}\n")
    log = kept.read_text()
    assert (
        log.index("before") < log.index("Traceback (most recent call last)") < log.index("ZeroDivisionError")
    )


def test_an_interruption_has_no_tail(tmp_path: Path) -> None:
    done = rank(tmp_path, "raise KeyboardInterrupt")
    assert done.returncode != 0
    assert done.stderr == "megatron_fdd: warning: of ours\n"


def test_without_a_log_everything_is_on_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = rank(tmp_path / "file" / "logs")
    assert "no log" in done.stderr
    assert "Not a directory" in done.stderr
    for text in PRINTED[:3]:
        assert text in done.stdout
    for text in ("descriptor 2", "a handler", "of others", "of ours"):
        assert text in done.stderr


@pytest.mark.tier("fast")
def test_an_undivided_process_prints(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    console.say("out")
    console.complain("err")
    console.show_end_of_log()
    assert console.keep_log(tmp_path / "logs") is None
    assert not (tmp_path / "logs").exists()
    assert tuple(capsys.readouterr()) == ("out\n", "err\n")


def test_a_full_disk_below_the_log_is_named(tmp_path: Path) -> None:
    """Megatron's own print is then the first to fail, with an error that names no file."""
    words = "console._divided.log = open('/dev/full', 'wb', 0); console.say(str(console.full_log()))"
    ended = rank(tmp_path, words, RANK="0")
    assert ended.stdout.splitlines()[-1].endswith("cannot be written: No space left on device")
