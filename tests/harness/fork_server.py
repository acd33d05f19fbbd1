"""A server that imports what the project's programs import, and forks a child for each `python` under test.

It is a program: `python fork_server.py DESCRIPTOR FOLDER`, where DESCRIPTOR is a listening Unix socket and FOLDER
has the launchers (`forked_python.py` starts it, `fork_launcher.py` talks to it). A child takes over a launcher's
streams, folder, environment and arguments, runs the program as `__main__` and ends as an interpreter does, except
that it does not take the image apart object by object (0.6 s).
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import logging
import marshal
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NoReturn

PR_SET_PDEATHSIG = 1
IMAGE = (
    "megatron_fdd.distill",
    "click",
    "megatron_fdd.convert.to_mcore",
    "megatron_fdd.convert.to_hf",
    "megatron_fdd.data.prepare",
    "megatron_fdd.evaluate.evaluation",
    "megatron_fdd.evaluate.report",
    "matplotlib.pyplot",
    "torch.distributed.run",
    "torch.distributed.elastic.rendezvous.c10d_rendezvous_backend",
    "tqdm.std",
    *(
        f"transformers.models.{name}.modeling_{name}"
        for name in ("gpt2", "llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
    ),
)
# Every program imports these for itself (0.2 s): Megatron's training configures logging and reads the clock, ours is
# what coverage measures.
FRESH = ("megatron.training", "megatron_fdd")
# The image read many of these while it was imported: with other values a program needs its own interpreter.
READ_AT_IMPORT = ("TORCH", "PYTORCH", "TRITON", "CUDA", "HF_", "TRANSFORMERS", "PYTHON", "MPL", "LD_")
# Variables of torchrun and Megatron; those that importing torch sets; those that rehearsal.start() may set late.
READ_LATER = ("TORCHELASTIC", "TORCH_NCCL", "TORCH_DIST", "CUDA_DEVICE_MAX_CONNECTIONS")
READ_LATER += (
    "PYTHONSAFEPATH",
    "TORCHINDUCTOR_CACHE_DIR",
    "TORCHDYNAMO_DISABLE",
    "TORCH_FORCE_WEIGHTS_ONLY_LOAD",
)
# These start or change interpreters.
OF_THE_INTERPRETER = ("pip", "venv", "ensurepip")


@dataclass(frozen=True, slots=True)
class Program:
    """The program that a command line of Python names; `arguments` become sys.argv."""

    kind: Literal["module", "command", "script", "stdin"]
    what: str
    arguments: list[str]
    unbuffered: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """A program, and what its process gets. `streams`: descriptors of stdin, stdout and stderr."""

    program: Program | None
    folder: str
    environment: Mapping[bytes, bytes]
    streams: list[int]


def import_image() -> None:
    """Import everything that the programs of this project import from elsewhere, as if no program had been named."""
    for name in IMAGE:
        importlib.import_module(name)
    for name in [name for name in sys.modules if name.startswith(FRESH)]:
        del sys.modules[name]
    del sys.modules["megatron"].training  # type: ignore[attr-defined]
    logging.root.handlers.clear()
    logging.root.setLevel(logging.WARNING)
    tasks = len(os.listdir("/proc/self/task"))
    assert tasks == 1, f"{tasks} threads, of which a fork would have one"
    gc.collect()
    gc.freeze()  # so that a child's collections leave the pages of the image alone


def parse(command: list[str], folder: str) -> Program | None:
    """Return the program in `command` (its first word is `python` or `torchrun`); None if a fork cannot run it."""
    if os.path.basename(command[0]) == "torchrun":
        return Program("module", "torch.distributed.run", command)
    words, unbuffered = command[1:], False
    while words[:1] == ["-u"]:
        words, unbuffered = words[1:], True
    if words[:1] == ["-"]:
        return Program("stdin", "<stdin>", words, unbuffered)
    if words[:1] in (["-m"], ["-c"]) and len(words) > 1:
        kind: Literal["module", "command"] = "module" if words[0] == "-m" else "command"
        if kind == "module" and words[1].partition(".")[0] in OF_THE_INTERPRETER:
            return None
        return Program(kind, words[1], [words[0], *words[2:]], unbuffered)
    if words and not words[0].startswith("-") and os.path.isfile(os.path.join(folder, words[0])):
        return Program("script", words[0], words, unbuffered)
    return None


def read_at_import(environment: Mapping[bytes, bytes]) -> dict[str, bytes]:
    """Return the part of an environment on which an image depends."""
    named = {os.fsdecode(name): value for name, value in environment.items()}
    return {
        name: value
        for name, value in named.items()
        if name.startswith(READ_AT_IMPORT) and not name.startswith(READ_LATER)
    }


def serve(listener: socket.socket, image: Mapping[str, bytes]) -> Request:
    """Serve for ever; return only in each child, with the request that it is to run.

    `image` is the `read_at_import` of this process. A launcher is told the child's process id (0: there is none,
    run the real interpreter), and in the end its status. When a launcher is gone, its child is killed.
    """
    events = selectors.DefaultSelector()
    events.register(listener, selectors.EVENT_READ)
    while True:
        (key, _), *_ = events.select()  # one at a time: the others may belong to the same child
        if key.fileobj is listener:
            connection, _ = listener.accept()
            request = _receive(connection, image)
            pid = os.fork() if request.program is not None else 0
            if request.program is not None and pid == 0:
                _close_all(events, connection)
                return request
            for stream in request.streams:
                os.close(stream)
            _tell(connection, pid)
            if pid == 0:
                connection.close()
                continue
            events.register(connection, selectors.EVENT_READ, pid)
            events.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, connection))
        elif isinstance(key.fileobj, socket.socket):  # the launcher's end is closed
            events.unregister(key.fileobj)
            os.kill(key.data, signal.SIGKILL)  # not reaped yet, so the id is still its own
        else:
            pid, connection = key.data
            _tell(connection, os.waitpid(pid, 0)[1])
            events.unregister(key.fileobj)
            os.close(key.fd)
            with contextlib.suppress(KeyError):
                events.unregister(connection)
            connection.close()


def _receive(connection: socket.socket, image: Mapping[str, bytes]) -> Request:
    header, streams, _, _ = socket.recv_fds(connection, 4, 3)
    length, data = int.from_bytes(header, "little"), b""
    while len(data) < length and (more := connection.recv(length - len(data))):
        data += more
    if not data or len(data) < length:  # the launcher was killed
        return Request(None, "", {}, streams)
    command, folder, environment = marshal.loads(data)
    differing = sorted(name for name, _ in read_at_import(environment).items() ^ image.items())
    if differing:
        print(
            f"an interpreter of its own, for {', '.join(differing)}: {command}", file=sys.stderr, flush=True
        )
    return Request(None if differing else parse(command, folder), folder, environment, streams)


def _tell(connection: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(number.to_bytes(4, "little", signed=True))


def _close_all(events: selectors.BaseSelector, connection: socket.socket) -> None:
    for key in list(events.get_map().values()):
        key.fileobj.close() if isinstance(key.fileobj, socket.socket) else os.close(key.fd)
    events.close()
    connection.close()


def become(request: Request, launchers: str) -> None:
    """Give this child everything that the launcher's process has."""
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for number, stream in enumerate(request.streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request.folder)
    os.environb.clear()
    os.environb.update(request.environment)
    if any(name.startswith(b"COVERAGE_PROCESS") for name in request.environment):
        with contextlib.suppress(ImportError):  # as Python itself begins where coverage is installed
            importlib.import_module("coverage").process_startup()
    # The workers that torchrun starts are forks too.
    sys.executable = os.path.join(launchers, "python")
    import numpy
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))
    numpy.random.seed()  # Python's own generator seeds itself anew after a fork


def run(program: Program) -> None:
    """Run a program as Python runs it."""
    if program.unbuffered:
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    sys.argv = program.arguments
    if program.kind == "module":
        if os.environ.get("PYTHONSAFEPATH"):
            del sys.path[0]
        else:
            sys.path[0] = os.getcwd()
        sys.modules.pop(program.what, None)  # it is to be executed, not found
        runpy.run_module(program.what, run_name="__main__", alter_sys=True)
    elif program.kind == "script":
        sys.path[0] = os.path.dirname(os.path.realpath(program.what))
        runpy.run_path(program.what, run_name="__main__")
    else:
        sys.path[0] = ""
        source = sys.stdin.read() if program.kind == "stdin" else program.what
        name = "<stdin>" if program.kind == "stdin" else "<string>"
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(source, name, "exec"), main.__dict__)


def status_of(program: Program) -> int:
    """Run a program; print what Python prints about an error, and return the exit status."""
    try:
        run(program)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def leave(status: int) -> NoReturn:
    """Wait for threads, call exit handlers, flush the streams and end this process."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    listening = socket.socket(fileno=int(sys.argv[1]))
    given = read_at_import(os.environb)  # importing sets some variables
    import_image()
    asked = serve(listening, given)
    become(asked, sys.argv[2])
    assert asked.program is not None
    leave(status_of(asked.program))
