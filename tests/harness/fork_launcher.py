"""`python` and `torchrun` for scripts under test: the fork server runs the program, and this process represents it.

`forked_python.py` writes this file after a `#!` line and sets the two names below. It must start quickly.
"""

import _signal
import _socket
import marshal
import os
import sys

REAL: list[str] = []  # the interpreter, and for torchrun its module
SERVER = ""  # a Unix socket

STREAMS = b"".join(descriptor.to_bytes(4, sys.byteorder) for descriptor in (0, 1, 2))
FORWARDED = [getattr(_signal, f"SIG{name}") for name in "TERM INT HUP QUIT USR1 USR2".split()]


def _receive(connection: _socket.socket) -> int:
    answer = connection.recv(4)
    if len(answer) < 4:
        sys.exit("the fork server is gone: its standard error is in the file `log` beside bin/")
    return int.from_bytes(answer, "little", signed=True)


def _forward_signals(pid: int) -> None:
    for number in FORWARDED:
        if _signal.getsignal(number) != _signal.SIG_IGN:
            _signal.signal(number, lambda received, _frame: os.kill(pid, received))


def main() -> None:
    """Send arguments, folder, environment and streams; end as the program ends, even by a signal."""
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    connection.connect(SERVER)
    request = marshal.dumps((sys.argv, os.getcwd(), dict(os.environb)))
    connection.sendmsg(
        [len(request).to_bytes(4, "little")], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, STREAMS)]
    )
    connection.sendall(request)
    pid = _receive(connection)
    if pid == 0:  # a fork of the image cannot be this program
        os.execv(REAL[0], [*REAL, *sys.argv[1:]])
    _forward_signals(pid)
    status = _receive(connection)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number not in (_signal.SIGKILL, _signal.SIGSTOP):
            _signal.signal(number, _signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.WEXITSTATUS(status))


if __name__ == "__main__":
    main()
