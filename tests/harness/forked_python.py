"""`python` and `torchrun` that start in a tenth of a second, for scripts under test: forks of one process.

    subprocess.run(["bash", script], env={**os.environ, **forked_python.environment()})

FORKED_PYTHON=0 uses the real ones instead. So does a machine with a GPU or with TransformerEngine: there a program
looks for them before it imports other packages.
"""

from __future__ import annotations

import functools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
HAS_GPU = torch.cuda.is_available()  # a test that rehearses in this process makes torch claim one


def environment(*, forked: bool = True) -> dict[str, str]:
    """Return PATH with the launchers first (or the real ones), and VENV, with which tools/env.sh puts them there."""
    real, venv = Path(sys.executable).parent, _venv() if forked and is_wanted() else Path(sys.prefix)
    return {"VENV": str(venv), "PATH": f"{venv / 'bin'}:{real}:{os.environ['PATH']}"}


def python() -> str:
    """Return the launcher, or the real interpreter where there are no forks."""
    return str(_venv() / "bin/python") if is_wanted() else sys.executable


def log() -> str:
    """Return what the server printed, for example why a program got its own interpreter."""
    return (_venv() / "log").read_text() if is_wanted() else ""


def close() -> None:
    """End the server, and with it what is left of its children.

    tests/conftest.py calls this at the end of the session.
    """
    if _SERVERS:
        server = _SERVERS.pop()
        server.kill()
        server.wait()
        shutil.rmtree(_venv())
        _venv.cache_clear()


_SERVERS: list[subprocess.Popen] = []


def is_wanted() -> bool:
    """Whether scripts under test run as forks on this machine."""
    asked = os.environ.get("FORKED_PYTHON", "1") != "0"
    return asked and not HAS_GPU and not any(distributions(name="transformer_engine"))


@functools.cache
def _venv() -> Path:
    """Make a folder with launchers as bin/python, bin/python3 and bin/torchrun, and start their server."""
    folder = Path(tempfile.mkdtemp(prefix="forked-"))
    (folder / "bin").mkdir()
    for name, module in (("python", []), ("python3", []), ("torchrun", ["-m", "torch.distributed.run"])):
        _write_launcher(folder / "bin" / name, [sys.executable, *module], folder / "socket")
    # Mark it as a finished set-up, so that tools/env.sh installs nothing here.
    stamp = 'cd "$1" && echo "$PWD $(cat pyproject.toml setup.py constraints.txt | cksum)"'
    (folder / ".megatron_fdd").write_bytes(subprocess.check_output(["bash", "-c", stamp, "bash", str(ROOT)]))
    with socket.socket(socket.AF_UNIX) as listener, (folder / "log").open("w") as log:
        listener.bind(str(folder / "socket"))
        listener.listen(64)  # launchers wait there while the server imports
        listener.set_inheritable(True)
        command = [sys.executable, str(HERE / "fork_server.py"), str(listener.fileno()), str(folder / "bin")]
        streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        # Coverage starts in each child, as in a separate process.
        own = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
        own |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        _SERVERS.append(subprocess.Popen(command, env=own, pass_fds=[listener.fileno()], **streams))
    return folder


def _write_launcher(path: Path, real: list[str], server: Path) -> None:
    source = (HERE / "fork_launcher.py").read_text()
    for name, value in (("REAL: list[str] = []", real), ('SERVER = ""', str(server))):
        assert source.count(f"\n{name}") == 1
        source = source.replace(name, f"{name.partition(' =')[0]} = {value!r}")
    path.write_text(f"#!{sys.executable} -IS\n{source}")
    path.chmod(0o755)
