"""The end of a rank on request: it prints its last words at once, and no other process prints them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.checkpoint import CheckpointException

from megatron_fdd.host.damage import cause_of
from megatron_fdd.host.process import (
    end_at_interrupt,
    end_with_launcher,
    ended_by_sigterm,
    ended_like_interrupt,
    raise_at_interrupt,
    status_after,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def status_of(child: int) -> int:
    """Return the exit status of a forked process; -N if signal N ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_sigterm_ends_a_rank_with_its_last_words() -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with ended_by_sigterm(lambda: os.write(writing, b"goes on after step 3")):
            os.write(writing, b"ready ")
            time.sleep(60)
            os._exit(0)
    assert os.read(reading, 100) == b"ready "
    os.kill(child, signal.SIGTERM)
    assert status_of(child) == 143
    assert os.read(reading, 100) == b"goes on after step 3"


def test_a_worker_that_is_ended_ends_alone() -> None:
    reading, writing = os.pipe()
    rank = os.fork()
    if rank == 0:
        with ended_by_sigterm(lambda: None):
            worker = os.fork()
            if worker == 0:
                os.write(writing, b"ready")
                time.sleep(60)
                os._exit(0)
            os.read(reading, 100)
            os.kill(worker, signal.SIGTERM)
            is_killed = status_of(worker) == -signal.SIGTERM
            time.sleep(0.05)
            os._exit(0 if is_killed else 1)
    assert status_of(rank) == 0


@pytest.mark.parametrize("launched_by_torchrun", [True, False])
def test_a_rank_ends_with_its_launcher(launched_by_torchrun: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if launched_by_torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    reading, writing = os.pipe()
    launcher = os.fork()
    if launcher == 0:
        if os.fork() == 0:
            end_with_launcher()
            os.write(writing, b"ready")
            time.sleep(0.5)
            os.write(writing, b", and lives on")
            os._exit(0)
        time.sleep(60)
        os._exit(0)
    os.close(writing)
    assert os.read(reading, 100) == b"ready"
    os.kill(launcher, signal.SIGKILL)
    assert status_of(launcher) == -signal.SIGKILL
    assert os.read(reading, 100) == (b"" if launched_by_torchrun else b", and lives on")
    os.close(reading)


@pytest.mark.parametrize(("first_process", "is_ended"), [("/sbin/init", True), ("python3 torchrun", False)])
def test_a_rank_whose_launcher_is_gone_already(
    first_process: str, is_ended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Process 1 has inherited it, or is the launcher itself, in a container."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    monkeypatch.setattr(os, "getppid", lambda: 1)
    monkeypatch.setattr(Path, "read_bytes", lambda _path: first_process.encode())
    child = os.fork()
    if child == 0:
        end_with_launcher()
        os._exit(0)
    assert status_of(child) == (137 if is_ended else 0)


def test_a_block_leaves_sigterm_as_it_was() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with ended_by_sigterm(lambda: None):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.set_wakeup_fd(-1) == -1


def test_an_interrupt_is_quiet_during_imports_alone() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        end_at_interrupt()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        raise_at_interrupt()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a shell's `command &`
        end_at_interrupt()
        raise_at_interrupt()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_cleans_up_when_it_is_asked_to_end(number: signal.Signals) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(number, signal.SIG_DFL)  # nohup ignores one of them
        try:
            with ended_like_interrupt():
                try:
                    os.write(writing, b"ready ")
                    time.sleep(60)
                finally:  # asked again, it goes on with its cleaning
                    os.kill(os.getpid(), number)
                    os.write(writing, b"clean")
        except KeyboardInterrupt as interrupt:
            os._exit(status_after(interrupt))
    os.close(writing)
    assert os.read(reading, 100) == b"ready "
    os.kill(child, number)
    assert status_of(child) == 128 + number
    assert os.read(reading, 100) == b"clean"


def test_a_commands_worker_ends_at_once() -> None:
    with ended_like_interrupt():
        worker = os.fork()
        if worker == 0:
            time.sleep(60)
            os._exit(0)
        time.sleep(0.05)
        os.kill(worker, signal.SIGTERM)
        assert status_of(worker) == -signal.SIGTERM


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup's
    try:
        with ended_like_interrupt():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
    assert status_after(KeyboardInterrupt()) == 130


def test_an_interrupted_checkpoint_is_no_damaged_one() -> None:
    """torch collects an interrupt while it reads or writes, as it does an error."""
    collected = CheckpointException("", {1: (KeyboardInterrupt(int(signal.SIGTERM)), None)})
    with pytest.raises(KeyboardInterrupt) as interrupt:
        cause_of(collected)
    assert status_after(interrupt.value) == 143


ENDING = """
import atexit, os, sys
from megatron_fdd.host.process import end_with

class Late:
    def __del__(self):
        os.abort()  # as a thread of gloo does that asks for an interpreter which is gone

late = Late()
atexit.register(print, "handler")

def main():
    print("works", end=" ")
    {end}

end_with(main)
"""


GROUPS = """
import sys
from types import SimpleNamespace
from megatron_fdd.host.process import end_with

sys.modules["torch.distributed"] = SimpleNamespace(
    is_initialized=lambda: True, destroy_process_group=lambda: print("destroyed")
)
end_with(lambda: {status})
"""


@pytest.mark.tier("default")
@pytest.mark.parametrize(("status", "printed"), [(0, "destroyed\n"), (1, ""), (143, "")])
def test_process_groups_are_destroyed_only_where_no_rank_can_be_missing(status: int, printed: str) -> None:
    """After an error the other ranks may be inside a collective; NCCL would wait for it."""
    program = GROUPS.format(status=status)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (status, printed)


@pytest.mark.tier("default")
@pytest.mark.parametrize(
    ("end", "status", "printed", "complaint"),
    [
        ("return 3", 3, "works handler\n", ""),
        ("pass", 0, "works handler\n", ""),
        ("sys.exit(4)", 4, "works handler\n", ""),
        ("sys.exit('no')", 1, "works handler\n", "no\n"),
        ("1 / 0", 1, "works handler\n", "ZeroDivisionError: division by zero\n"),
        ("raise KeyboardInterrupt", 130, "works handler\n", "KeyboardInterrupt\n"),
        (
            "sys.stdout.flush(); sys.stdout = open('/dev/full', 'w'); print('more')",
            120,
            "works ",
            "what was printed cannot be written: No space left on device; make room there\n",
        ),
    ],
)
def test_a_process_ends_without_tearing_down_the_interpreter(
    end: str, status: int, printed: str, complaint: str
) -> None:
    """Whatever is left behind cannot change the status; exit handlers and streams are served as always."""
    program = ENDING.format(end=end)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (status, printed)
    assert result.stderr.endswith(complaint)
    assert bool(result.stderr) == bool(complaint)
