"""Where answers come from: a running server of vLLM, or one in this process."""

from __future__ import annotations

import itertools
import json
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from megatron_fdd.data.store.coverage import Ids
from megatron_fdd.data.store.segment import Bytes
from megatron_fdd.teach.vllm.checks import Expected, restart
from megatron_fdd.teach.vllm.client import Client
from megatron_fdd.teach.vllm.settings import CONNECTOR
from megatron_fdd.teach.vllm.state_file import NAME_TAG, StateFiles

# Requests that a server has at once.
IN_FLIGHT = 64


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a unit.

    Attributes:
        states_SLT: hidden states, checked.
        logprobs: of all tokens but the first, where they were asked for.
    """

    ids: Ids
    states_SLT: Tensor
    logprobs: Sequence[float] | None


Finish = Callable[[Answer], Bytes]


class Source(Protocol):
    """A vLLM that runs.

    Attributes:
        version: vLLM's.
        max_model_len: tokens of a request, the generated one included.
    """

    version: str
    max_model_len: int

    def ask(
        self, units: Sequence[Ids], expected: Expected, compared: Collection[int], finish: Finish
    ) -> list[Bytes]:
        """Run some units, and finish each answer as it comes; return what that gives, in the order of the units.

        Args:
            compared: numbers of the units whose log-probabilities are wanted.

        Raises:
            ValueError: what came is not sound, or nothing came.
        """


class ServerSource:
    """A running server.

    Args:
        files: the folder in which it writes.
        teacher: its folder; the server may have it under another path.
        command: how the server must be started, for messages.

    Raises:
        ValueError: there is no server, or it serves other models alone.
    """

    def __init__(self, client: Client, files: StateFiles, teacher: Path, command: str) -> None:
        self.source = f"--url {client.url}"
        self._client, self._files, self._command = client, files, command
        self.version = str(_field(client.get("/version"), "version", f"{self.source}: /version"))
        self.model, self.root, self.max_model_len = _served(client.get("/v1/models"), teacher, self.source)

    def ask(
        self, units: Sequence[Ids], expected: Expected, compared: Collection[int], finish: Finish
    ) -> list[Bytes]:
        """Send all units, several at once; what `Source.ask` says."""
        threads = ThreadPoolExecutor(IN_FLIGHT)
        work = [
            threads.submit(self._run, ids, expected, number in compared, finish)
            for number, ids in enumerate(units)
        ]
        try:
            done, _ = wait(work, return_when=FIRST_EXCEPTION)
            for each in done:
                each.result()
        except BaseException:
            for each in work:
                each.cancel()
            self._client.stop()
            wait(work)
            raise
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
        return [each.result() for each in work]

    def _run(self, ids: Ids, expected: Expected, wants_logprobs: bool, finish: Finish) -> Bytes:
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": ids.tolist(),
            "max_tokens": 1,
            "temperature": 0,
            "return_token_ids": True,
            "request_id": f"{NAME_TAG}{uuid.uuid4().hex}",
        }
        if wants_logprobs:
            body["prompt_logprobs"] = 0
        reply = self._client.post("/v1/completions", body)
        choice = _field(reply, "choices", f"{self.source}: /v1/completions")
        choice = choice[0] if isinstance(choice, list) and choice and isinstance(choice[0], dict) else {}
        path = self._path(reply)
        try:
            read = choice.get("prompt_token_ids")
            if isinstance(read, list):
                expected.check_ids(read, ids)
            tensors = self._files.read(path)
            states_SLT = expected.states(tensors, ids)
            logprobs = (
                own_logprobs(choice.get("prompt_logprobs"), ids, self.source) if wants_logprobs else None
            )
            return finish(Answer(ids, states_SLT, logprobs))
        finally:
            self._files.remove(path)

    def _path(self, reply: Any) -> str:
        """Return where the hidden states are. Refuse a server without the connector."""
        told = reply.get("kv_transfer_params")
        path = told.get("hidden_states_path") if isinstance(told, dict) else None
        if not isinstance(path, str) or not path.endswith(".safetensors"):
            had = f"kv_transfer_params {json.dumps(told)[:80]}" if told else "no kv_transfer_params"
            raise ValueError(
                f"{self.source}: the server gives no hidden states ({had}): it runs without {CONNECTOR}; start it "
                f"again with: {self._command}"
            )
        return path


def own_logprobs(told: Any, ids: Ids, source: str) -> list[float]:
    """Read the log-probabilities of a prompt's own tokens, but the first, from an answer's `prompt_logprobs`."""
    found: list[float] = []
    if isinstance(told, list) and len(told) == len(ids):
        for number, place in itertools.islice(zip(ids.tolist(), told, strict=True), 1, None):
            entry = place.get(str(number), place.get(number)) if isinstance(place, Mapping) else None
            value = entry.get("logprob") if isinstance(entry, Mapping) else getattr(entry, "logprob", None)
            if isinstance(value, int | float):
                found.append(float(value))
    if len(found) != len(ids) - 1:
        raise restart(
            source,
            "it gives no log-probabilities of its prompt (prompt_logprobs), with which its states are compared",
        )
    return found


def _field(reply: Any, name: str, what: str) -> Any:
    if not isinstance(reply, dict) or name not in reply:
        raise ValueError(f"{what}: the answer has no {name}; give the address of a server of vLLM")
    return reply[name]


def _served(reply: Any, teacher: Path, source: str) -> tuple[str, str, int]:
    """Return the name, the folder and the longest request of the served model that is the teacher."""
    models = _field(reply, "data", f"{source}: /v1/models")
    models = [each for each in models if isinstance(each, dict) and not each.get("parent")]
    names = [str(each.get("root") or each.get("id")) for each in models]
    own = [n for n, name in enumerate(names) if _is_same(name, teacher)]
    if not own and len(models) == 1:
        other = Path(names[0])
        if not (other.is_dir() and teacher.is_dir()):
            own = [0]
    if not own:
        raise ValueError(
            f"{source}: serves {', '.join(names) or 'no model'}, and not --teacher {teacher}; give the folder that it "
            "serves, or another server"
        )
    chosen = models[own[0]]
    longest = chosen.get("max_model_len")
    return str(chosen.get("id")), names[own[0]], longest if isinstance(longest, int) else 2**31


def _is_same(name: str, teacher: Path) -> bool:
    try:
        return Path(name).samefile(teacher)
    except OSError:
        return name == str(teacher)
