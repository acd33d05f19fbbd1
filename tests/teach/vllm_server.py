"""A stand-in for a server of vLLM: its interface and its files, by a tiny model of transformers, with planted faults.

What it does is written down from vLLM's sources (0.33.0); no vLLM is here to compare it with.
"""

from __future__ import annotations

import fcntl
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from tests.teach.engines import plain_states

# S tokens, L blocks, T width

Tensors = dict[str, Tensor]


# Held while a model runs. Requests may outlive the test that sent them, and hooks of the next one would see their run.
RUNNING = threading.Lock()


@dataclass
class StandIn:
    """What the server has, and what is wrong with it.

    Attributes:
        model: in float32.
        folder: where it writes.
        root: the folder that it says it serves.
        dtype: of the states that it writes.
        spoil: changes the tensors of a file; given the server and the ids too.
        spoil_reply: changes an answer.
        write: how a file is written: whole, half, not, nowhere or never.
        status: of answers to completions, one after the other; behind them 200.
        most: requests until it goes away; None: it stays.
    """

    model: Any
    folder: Path
    blocks: Sequence[int]
    root: str
    version: str = "0.33.0"
    dtype: torch.dtype = torch.float32
    spoil: Callable[[StandIn, Tensors, np.ndarray], Tensors] = lambda _server, tensors, _ids: tensors
    spoil_reply: Callable[[dict[str, Any]], dict[str, Any]] = lambda reply: reply
    write: str = "whole"
    status: list[int] = field(default_factory=list)
    most: int | None = None
    max_model_len: int = 4096
    asked: list[dict[str, Any]] = field(default_factory=list)

    def run(self, ids: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the states [S, L, T] of the blocks, and the logits."""
        with RUNNING:
            states, logits = plain_states(self.model, ids)
        return torch.stack([states[block - 1] for block in self.blocks], dim=1).to(self.dtype), logits

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """Run a request, begin to write its file, and return the answer."""
        ids = np.array(body["prompt"], np.int32)
        states_SLT, logits = self.run(ids)
        sound = {"hidden_states": states_SLT, "token_ids": torch.from_numpy(ids.astype(np.int64))}
        tensors = self.spoil(self, sound, ids)
        name = f"cmpl-{body['request_id']}-0-1234abcd.safetensors"
        self.file(self.folder / name, {key: value.contiguous() for key, value in tensors.items()})
        logprobs = None
        if body.get("prompt_logprobs") is not None:
            table = logits.float().log_softmax(-1)
            own = [float(table[place, token]) for place, token in enumerate(ids[1:].tolist())]
            logprobs = [None] + [
                {str(token): {"logprob": value, "rank": 1, "decoded_token": "x"}}
                for token, value in zip(ids[1:].tolist(), own, strict=True)
            ]
        choice = {"text": "x", "prompt_logprobs": logprobs, "prompt_token_ids": ids.tolist()}
        return self.spoil_reply(
            {"choices": [choice], "kv_transfer_params": {"hidden_states_path": f"/at/the/server/{name}"}}
        )

    def file(self, path: Path, tensors: Tensors) -> None:
        """Write a file as the connector does: under a lock that is held before the answer goes out."""
        if self.write == "nowhere":
            return
        lock = path.with_name(f"{path.name}.lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
        if self.write == "never":
            self.held = lock
            return

        def write() -> None:
            data = save(tensors)
            with lock:
                if self.write == "not":
                    return
                with path.open("wb") as file:
                    file.write(data[: len(data) // 2])
                    file.flush()
                    if self.write == "whole":
                        time.sleep(0.005)
                        file.write(data[len(data) // 2 :])

        threading.Thread(target=write, daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    stand_in: StandIn

    def do_GET(self) -> None:  # noqa: N802  # the base class's name
        server = self.stand_in
        model = {"id": "teacher", "root": server.root, "max_model_len": server.max_model_len, "parent": None}
        adapter = {"id": "adapted", "root": "elsewhere", "parent": "teacher"}
        replies = {"/version": {"version": server.version}, "/v1/models": {"data": [adapter, model]}}
        self._reply(200 if self.path in replies else 404, replies.get(self.path, {"error": "Not Found"}))

    def do_POST(self) -> None:  # noqa: N802
        server, body = self.stand_in, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.asked.append(body)
        if server.most is not None and len(server.asked) > server.most:
            self.close_connection = True
            return
        status = server.status.pop(0) if server.status else 200
        if status < 0:
            time.sleep(-status)
        self._reply(status, server.answer(body) if status == 200 else {"message": "no\nmore room"})

    def _reply(self, status: int, reply: Any) -> None:
        data = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_arguments: Any) -> None:
        pass


@contextmanager
def serving(stand_in: StandIn) -> Iterator[str]:
    """Run a server in a thread; give its address."""
    handler = type("Handler", (_Handler,), {"stand_in": stand_in})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.handle_error = lambda *_given: None  # type: ignore[method-assign]  # a client that went away
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
