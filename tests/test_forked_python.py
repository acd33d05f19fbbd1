"""Forked programs behave as programs that an interpreter of their own runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import forked_python

pytestmark = [
    pytest.mark.skipif(not forked_python.is_wanted(), reason="no forks here"),
    pytest.mark.tier("default"),
]
TIMEOUT_S = 120
# Whether this process is a fork.
TELL = 'print("fork_server" in open("/proc/self/cmdline").read().split("\\0")[1])'


def bash(script: str, folder: Path, text: str = "", **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, **forked_python.environment(), **more},
        cwd=folder,
        input=text,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def is_fork(pid: int) -> bool:
    """Whether a live process is a fork of the server."""
    return b"fork_server" in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_folder_environment_arguments_and_streams(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("NAME = 'beside'")
    (tmp_path / "inner").mkdir()
    (tmp_path / "program.py").write_text(
        "import json, os, sys, beside\n"
        "print(json.dumps([os.getcwd(), os.environ['KNOB'], sys.argv, sys.stdin.read(), __name__, beside.NAME]))\n"
        "print(open(f'/proc/{os.getpid()}/cmdline').read().count('fork_server'), file=sys.stderr)"
    )
    done = bash("cd inner && python ../program.py one 'two words'", tmp_path, "said", KNOB="set")
    found = [
        str(tmp_path / "inner"),
        "set",
        ["../program.py", "one", "two words"],
        "said",
        "__main__",
        "beside",
    ]
    assert json.loads(done.stdout) == found
    assert done.stderr == "1\n"
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("script", "out", "status"),
    [
        ("python -c 'import sys; print(sys.argv, sys.path[0])' a", "['-c', 'a'] \n", 0),
        ("echo 'import sys; print(sys.argv)' | python - a", "['-', 'a']\n", 0),
        ("python -u -m where a", "where ['a'] __main__ where\n", 0),
        ("python3 -c 'import sys; sys.exit(3)'", "", 3),
        ("python -c 'import sys; sys.exit(\"why\")'", "", 1),
        (
            "python -c 'import atexit, sys; atexit.register(print, 5); sys.stdout.write(\"4\"); 1 / 0'",
            "45\n",
            1,
        ),
        ("python -c 'import os; os.kill(os.getpid(), 9)'", "", 128 + signal.SIGKILL),
        ("$(python -c 'import sys; print(sys.executable)') -c 'print(6)'", "6\n", 0),
    ],
)
def test_ways_to_run_and_to_end(script: str, out: str, status: int, tmp_path: Path) -> None:
    (tmp_path / "where.py").write_text(
        "import pathlib, sys\nprint(pathlib.Path(__file__).stem, sys.argv[1:], __name__, __spec__.name)"
    )
    done = bash(f"{script}; exit $?", tmp_path)
    assert (done.stdout, done.returncode) == (out, status)


@pytest.mark.parametrize(
    "script",
    [
        "python -I -c 'TELL'",
        "HF_HUB_OFFLINE=1 TORCH_HOME=/ python -c 'TELL'",
        "python -m pip --version >&2; echo False",
    ],
)
def test_what_no_fork_can_do_is_done_by_an_interpreter_of_its_own(script: str, tmp_path: Path) -> None:
    done = bash(script.replace("TELL", TELL), tmp_path)
    assert (done.stdout, done.returncode) == ("False\n", 0)


def test_what_a_session_of_tests_sets_itself_is_no_reason(tmp_path: Path) -> None:
    """Importing torch sets the folder, a benchmark MKL's threads, rehearsing in the test's own process the others."""
    own = {"TORCHINDUCTOR_CACHE_DIR": "/", "TORCHDYNAMO_DISABLE": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    own["MKL_NUM_THREADS"] = "1"
    assert bash(f"python -c '{TELL}'", tmp_path, **own).stdout == "True\n", forked_python.log()


def test_threads_are_as_many_as_the_environment_says(tmp_path: Path) -> None:
    done = bash("python -c 'import torch; print(torch.get_num_threads())'", tmp_path, OMP_NUM_THREADS="3")
    assert done.stdout == "3\n"


SLEEPER = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"


@pytest.fixture
def sleeper() -> Iterator[tuple[subprocess.Popen, int]]:
    """A launcher whose program sleeps, and the program's process."""
    launcher = subprocess.Popen([forked_python.python(), "-c", SLEEPER], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    pid = int(launcher.stdout.readline())
    assert is_fork(pid)
    assert pid != launcher.pid
    yield launcher, pid
    launcher.kill()
    launcher.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL])
def test_a_signal_to_the_launcher_ends_both(sleeper: tuple[subprocess.Popen, int], number: int) -> None:
    launcher, pid = sleeper
    launcher.send_signal(number)
    assert launcher.wait(TIMEOUT_S) == -number
    deadline = time.monotonic() + TIMEOUT_S
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


RANK = """
import os, sys
import torch.distributed as dist
dist.init_process_group("gloo")
dist.barrier()
rank = dist.get_rank()
line = f"rank {rank} {open('/proc/self/cmdline').read().count('fork_server')}"
os.write(1, f"{line}\\n".encode())  # at once: the other rank writes too
sys.exit(5 * rank * int(sys.argv[1]))
"""


@pytest.mark.parametrize("fails", [0, 1])
def test_torchrun(fails: int, tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    done = bash(f"torchrun --standalone --nproc-per-node 2 rank.py {fails}", tmp_path)
    assert sorted(done.stdout.splitlines()) == ["rank 0 1", "rank 1 1"]
    assert done.returncode == fails
    assert ("exitcode  : 5" in done.stderr) == bool(fails)
