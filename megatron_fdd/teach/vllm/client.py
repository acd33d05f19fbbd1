"""A client of a server of vLLM, of the standard library alone; each failure is one line."""

from __future__ import annotations

import http.client
import json
import os
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

# A server that loads or is overloaded answers late, one that hangs never.
_CONNECT_S, _ANSWER_S = 10.0, 600.0
# Between attempts, where the server does not answer, or says that it is its own fault.
_PAUSES_S = (1.0, 5.0, 20.0)
_MOST_TEXT = 300
_MEANINGS = {401: "set VLLM_API_KEY to its key", 404: "give the address of a server of vLLM"}


class Client:
    """Requests to one server, from several threads.

    Args:
        pauses_s: seconds between attempts of a request; one more attempt than pauses.
    """

    def __init__(
        self, url: str, *, answer_s: float = _ANSWER_S, pauses_s: Sequence[float] = _PAUSES_S
    ) -> None:
        self.url = url
        self._parts, self._answer_s, self._pauses_s = urlsplit(url), answer_s, pauses_s
        self._open: set[http.client.HTTPConnection] = set()
        self._lock, self.stopped = threading.Lock(), threading.Event()

    def get(self, path: str) -> Any:
        """Return what a server says at a path; asked once.

        Raises:
            ValueError: there is no server, or it says something else than JSON.
        """
        return self._read(path, *self._once("GET", path, None))

    def post(self, path: str, body: Any) -> Any:
        """Send JSON and return the answer; asked again where the server does not answer, or fails.

        Raises:
            ValueError: it does not answer, or refuses.
        """
        sent = json.dumps(body).encode()
        for pause_s in (*self._pauses_s, None):
            try:
                status, text = self._once("POST", path, sent)
                if status < 500 or pause_s is None:
                    return self._read(path, status, text)
            except _NoAnswerError:
                if pause_s is None or self.stopped.is_set():
                    raise
            self.stopped.wait(pause_s)
        raise AssertionError("the last attempt has no pause")

    def stop(self) -> None:
        """End all requests at work; their threads get an error."""
        self.stopped.set()
        with self._lock:
            for connection in self._open:
                if connection.sock is not None:
                    with suppress(OSError):
                        connection.sock.shutdown(socket.SHUT_RDWR)

    def _once(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
        """Return the status and the text of an answer."""
        is_safe = self._parts.scheme == "https"
        kind = http.client.HTTPSConnection if is_safe else http.client.HTTPConnection
        connection = kind(self._parts.hostname or "", self._parts.port, timeout=_CONNECT_S)
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        with self._lock:
            self._open.add(connection)
        try:
            connection.connect()
            connection.sock.settimeout(self._answer_s)
            if self.stopped.is_set():
                raise ConnectionAbortedError("stopped")
            connection.request(method, self._parts.path + path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except TimeoutError as error:
            if connection.sock is None:
                raise self._silence(error) from error
            raise ValueError(
                f"--url {self.url}: no answer in {self._answer_s:.0f} s; see the server's log, and start the same "
                "command again"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise self._silence(error) from error
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()

    def _silence(self, error: Exception) -> _NoAnswerError:
        return _NoAnswerError(
            f"--url {self.url}: no server answers there ({type(error).__name__}: {error}); see that it runs, and start "
            "the same command again"
        )

    def _read(self, path: str, status: int, text: bytes) -> Any:
        """Return an answer's JSON. ValueError if it is none, or the server refuses."""
        if status != 200:
            said = " ".join(text.decode(errors="replace").split())[:_MOST_TEXT]
            what = _MEANINGS.get(status, "start it as --dry-run says")
            raise ValueError(
                f"--url {self.url}: {path}: status {status} ({said}); see the server's log, or {what}"
            )
        try:
            return json.loads(text)
        except ValueError as error:
            raise ValueError(
                f"--url {self.url}: {path}: the answer is no JSON; give the address of a server of vLLM"
            ) from error


class _NoAnswerError(ValueError):
    """Nobody answered; perhaps a later attempt is answered."""
