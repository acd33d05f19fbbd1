"""The engine `vllm` against a stand-in: states and lens of a sound server, and every fault by its name."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.tiny_teachers import WIDTH, tiny_model
from megatron_fdd.data.store.lens import StoredLens
from megatron_fdd.step.teacher.tap_format import TapFormat
from megatron_fdd.teach.hf_parts import Parts, find_parts
from megatron_fdd.teach.vllm.agreement import agree, told
from megatron_fdd.teach.vllm.checks import Expected, check_version
from megatron_fdd.teach.vllm.client import Client
from megatron_fdd.teach.vllm.engine import VllmEngine
from megatron_fdd.teach.vllm.source import ServerSource
from megatron_fdd.teach.vllm.state_file import NAME_TAG, StateFiles
from tests.teach.engines import BLOCKS, engine_of, logits_of, plain_states, units, unpacked
from tests.teach.vllm_server import RUNNING, StandIn, Tensors, serving

COMMAND = "vllm serve teacher --port 8000"


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


@pytest.fixture
def stand_in(model: Any, tmp_path: Path) -> StandIn:
    folder = tmp_path / "states"
    folder.mkdir()
    return StandIn(model, folder, BLOCKS, "/at/the/server/teacher")


def parts_of(model: Any) -> Parts:
    """Find the parts while no request of an earlier test still runs the model."""
    with RUNNING:
        return find_parts(model)


@contextmanager
def engine_at(stand_in: StandIn, form: str = "float32", dtype: str = "float32", answer_s: float = 5.0) -> Any:
    """Give an engine that asks the server."""
    parts = parts_of(stand_in.model)
    with serving(stand_in) as url:
        client = Client(url, answer_s=answer_s, pauses_s=(0.01,))
        files = StateFiles(stand_in.folder, client.stopped, appear_s=0.2, write_s=0.2)
        source = ServerSource(client, files, Path("/models/teacher"), COMMAND)
        expected = Expected("--url U", BLOCKS, WIDTH, {"float32": torch.float32}.get(dtype, torch.bfloat16))
        lens = StoredLens(parts.folded_norm, parts.head_VT.to(expected.dtype), float("nan"), parts.extras)
        identity = engine_of(stand_in.model, parts, form, dtype).identity  # type: ignore[arg-type]
        yield VllmEngine(identity, source, lens, expected)


def test_states_and_lens_are_the_models(stand_in: StandIn, model: Any) -> None:
    texts = units()
    wanted = engine_of(model, parts_of(model))
    with engine_at(stand_in) as engine:
        lens = engine.lens(texts[:2])
        found = engine.states(texts)
    assert lens.error < 1e-5
    for ids, mine, own in zip(texts, found, wanted.states(texts), strict=True):
        assert mine.shape == own.shape
        torch.testing.assert_close(unpacked(mine), unpacked(own), atol=1e-5, rtol=0)
        logits = model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0]
        torch.testing.assert_close(logits_of(lens, unpacked(mine)[-1]), logits, atol=1e-4, rtol=0)
    assert list(stand_in.folder.iterdir()) == []  # taken over
    assert [body.get("prompt_logprobs") for body in stand_in.asked].count(
        0
    ) == 3  # of the lens, and of a batch
    assert all(body["model"] == "teacher" and body["max_tokens"] == 1 for body in stand_in.asked)


@pytest.mark.parametrize("form", ["bf16", "int8"])
def test_states_are_packed(form: str, stand_in: StandIn) -> None:
    stand_in.dtype, texts = torch.bfloat16, units()
    with engine_at(stand_in, form, "bfloat16") as engine:
        assert 0 < engine.lens(texts[:1]).error < 2e-2
        found = engine.states(texts)
    for ids, states in zip(texts, found, strict=True):
        packed = TapFormat(torch.bfloat16, form).pack(stand_in.run(ids)[0].transpose(0, 1).contiguous())  # type: ignore[arg-type]
        assert np.array_equal(states, packed.view(torch.uint8).numpy())


def states_of(change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return lambda _server, tensors, _ids: {**tensors, "hidden_states": change(tensors["hidden_states"])}


def _other_id(_server: StandIn, tensors: Tensors, _ids: np.ndarray) -> Tensors:
    ids = tensors["token_ids"].clone()
    ids[3] += 1
    return {**tensors, "token_ids": ids}


def _doubled(server: StandIn, tensors: Tensors, ids: np.ndarray) -> Tensors:
    twice = np.concatenate([ids[:1], ids])
    return {"hidden_states": server.run(twice)[0], "token_ids": torch.from_numpy(twice.astype(np.int64))}


def _doubled_unseen(end: slice) -> Any:
    def spoil(server: StandIn, tensors: Tensors, ids: np.ndarray) -> Tensors:
        return {**tensors, "hidden_states": _doubled(server, tensors, ids)["hidden_states"][end]}

    return spoil


def _normed(server: StandIn, tensors: Tensors, _ids: np.ndarray) -> Tensors:
    states = tensors["hidden_states"].clone()
    states[:, -1] = server.model.model.norm(states[:, -1])
    return {**tensors, "hidden_states": states}


def _hole(value: float) -> Any:
    def change(states: torch.Tensor) -> torch.Tensor:
        states = states.clone()
        states[5:, 1] = value
        return states

    return states_of(change)


FILES: dict[str, tuple[Any, str]] = {
    "other ids": (_other_id, r"it read other tokens than it was sent \(another token at place 3\)"),
    "doubled start token": (_doubled, r"put in front of a unit, a doubled start token\)"),
    "doubled start token, the ids as sent, late": (
        _doubled_unseen(slice(-1)),
        "log-probabilities are not those",
    ),
    "doubled start token, the ids as sent": (
        _doubled_unseen(slice(1, None)),
        "nothing near them fits better: ",
    ),
    "late": (states_of(lambda states: states.roll(1, 0)), "one token late, as with a doubled start token"),
    "shifted": (states_of(lambda states: states.roll(-1, 0)), "states lie one token early"),
    "one state too few": (states_of(lambda states: states[1:]), r"too few: the prefix cache .*vllm#44485"),
    "one layer too few": (
        states_of(lambda states: states[:, 1:]),
        "for other layers than the blocks 1, 3, 4",
    ),
    "another model": (states_of(lambda states: states[..., 1:]), "it serves another model than --teacher"),
    "two dimensions": (states_of(lambda states: states.flatten(1)), "a connector or version that is not kno"),
    "zeros": (_hole(0.0), r"block 3 is all zeros, as hybrid models .*vllm#46301"),
    "NaN": (_hole(torch.nan), "block 3 is not finite"),
    "the last layer twice": (
        states_of(lambda states: states[:, [0, 1, 1]]),
        r"blocks 3 and 4 have the same states: .*vllm#48124",
    ),
    "layers reversed": (
        states_of(lambda states: states.flip(1)),
        "what came for block 1 fits: the layers are",
    ),
    "inner layers swapped": (states_of(lambda states: states[:, [1, 0, 2]]), "in another order than 1, 3, 4"),
    "the last state normed": (_normed, "has been through the final norm already"),
    "another precision": (states_of(torch.Tensor.bfloat16), "are in bfloat16, and --dtype is float32"),
    "8 bits": (
        lambda _server, tensors, _ids: {**tensors, "hidden_states_scale": torch.ones(1)},
        "hidden_states_scale: hidden states in 8 bits with one scale over all layers, as of hs-conn",
    ),
    "unknown names": (
        lambda _server, tensors, _ids: {"states": tensors["hidden_states"]},
        "tensors states in the place of hidden_states and token_ids",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_not_sound_is_refused(name: str, stand_in: StandIn) -> None:
    stand_in.spoil, wanted = FILES[name]
    with engine_at(stand_in) as engine, pytest.raises(ValueError, match=wanted):
        engine.lens(units([40]))


@pytest.mark.parametrize("name", ["zeros", "shifted", "the last state normed"])
def test_each_batch_is_checked(name: str, stand_in: StandIn) -> None:
    """A server may be started again in the middle."""
    with engine_at(stand_in) as engine:
        engine.states(units())
        stand_in.spoil, wanted = FILES[name]
        with pytest.raises(ValueError, match=wanted):
            engine.states(units())


WRITES = {
    "half": r"is cut off or longer than its header says; make room in that folder",
    "not": r"let go of its lock and wrote no file; its log has the reason",
    "nowhere": r"which does not appear here in 0 s; give the folder that it has as shared_storage_path",
    "never": r"\.lock: the server holds it for 0 s; look at its log",
}


@pytest.mark.parametrize("write", WRITES)
def test_a_file_that_never_becomes_whole_is_refused(write: str, stand_in: StandIn) -> None:
    stand_in.write = write
    with engine_at(stand_in) as engine, pytest.raises(ValueError, match=WRITES[write]):
        engine.states(units()[:1])


def _reply(**fields: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda reply: {**reply, **fields}


def _choice(**fields: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda reply: {**reply, "choices": [{**reply["choices"][0], **fields}]}


REPLIES: dict[str, tuple[Any, str]] = {
    "no connector": (
        _reply(kv_transfer_params=None),
        rf"no hidden states \(no kv_transfer_params\): .* start it again with: {COMMAND}",
    ),
    "another connector": (
        _reply(kv_transfer_params={"remote_host": "n1"}),
        r'no hidden states \(kv_transfer_params \{"remote_host": "n1"\}\)',
    ),
    "other ids": (_choice(prompt_token_ids=[9, 9]), "read other tokens than it was sent"),
    "no log-probabilities": (_choice(prompt_logprobs=None), "no log-probabilities of its prompt"),
    "no choices": (lambda reply: {}, "the answer has no choices"),
}


@pytest.mark.parametrize("name", REPLIES)
def test_an_answer_that_is_not_sound_is_refused(name: str, stand_in: StandIn) -> None:
    stand_in.spoil_reply, wanted = REPLIES[name]
    with engine_at(stand_in) as engine, pytest.raises(ValueError, match=wanted):
        engine.lens(units()[:1])


@pytest.mark.parametrize(
    ("status", "wanted"),
    [
        (
            [400],
            r"status 400 \(\{\"message\": \"no\\nmore room\"\}\); see the server's log, or start it as --dry-run",
        ),
        ([401], "status 401 .*, or set VLLM_API_KEY to its key"),
        ([503, 503], "status 503 "),
        ([-1], "no answer in 0 s; see the server's log"),
    ],
)
def test_a_request_that_is_refused_is_one_line(status: list[int], wanted: str, stand_in: StandIn) -> None:
    stand_in.status = status
    with engine_at(stand_in, answer_s=0.2) as engine, pytest.raises(ValueError, match=wanted) as raised:
        engine.states(units()[:1])
    assert "\n" not in str(raised.value)


def test_a_fault_that_passes_is_asked_again(stand_in: StandIn) -> None:
    stand_in.status = [500]
    with engine_at(stand_in) as engine:
        assert len(engine.states(units()[:1])) == 1
    assert len(stand_in.asked) == 2


def test_a_server_that_goes_away_ends_all_requests_at_once(stand_in: StandIn) -> None:
    stand_in.most = 2
    with engine_at(stand_in) as engine:
        started_s = time.monotonic()
        with pytest.raises(ValueError, match="no server answers there"):
            engine.states(units([5] * 12))
        assert time.monotonic() - started_s < 3
    with pytest.raises(ValueError, match=r"no server answers there \(ConnectionRefusedError"):
        Client("http://127.0.0.1:9").get("/version")


def test_a_refusal_ends_requests_that_are_not_answered(stand_in: StandIn) -> None:
    stand_in.status = [-5, 400]
    with engine_at(stand_in, answer_s=4.0) as engine:
        started_s = time.monotonic()
        with pytest.raises(ValueError, match="status 400"):
            engine.states(units([5, 5]))
        assert time.monotonic() - started_s < 3


@pytest.mark.parametrize(
    ("apart", "is_sound"),
    [({}, True), ({7: 5e-5}, True), ({7: 2e-4}, False), (dict.fromkeys(range(39), 5e-5), False)],
)
def test_log_probabilities_may_differ_by_rounding(
    apart: dict[int, float], is_sound: bool, model: Any
) -> None:
    """By a part of the largest logit: 1e-4 in one place, in float32, and a tenth of it on average."""
    [ids], parts = units([40]), parts_of(model)
    states, logits = plain_states(model, ids)
    own = logits[:-1].log_softmax(-1).gather(1, torch.from_numpy(ids[1:, None].astype(np.int64)))[:, 0]
    for place, much in apart.items():
        own[place] += much * float(logits[:-1].abs().max())
    lens = StoredLens(parts.folded_norm, parts.head_VT, 0.0, parts.extras)
    said = told(ids, own.tolist(), 128)
    assert list(said.places) == list(range(39))
    with nullcontext() if is_sound else pytest.raises(ValueError, match="log-probabilities are not those"):
        agree(lens, torch.stack(states, dim=1), said, (1, 2, 3, 4), "U")


def test_places_are_spread_over_a_unit() -> None:
    assert list(told(units([40])[0], [0.0] * 39, 4).places) == [9, 19, 29, 38]


def test_a_server_of_another_model_is_refused(stand_in: StandIn, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "own").mkdir()
    stand_in.root = str(tmp_path / "other")
    files = StateFiles(stand_in.folder, Client("http://x").stopped)
    with serving(stand_in) as url:
        with pytest.raises(ValueError, match=r"serves .*other, and not --teacher .*own; give the folder"):
            ServerSource(Client(url), files, tmp_path / "own", COMMAND)
        assert ServerSource(Client(url), files, tmp_path / "other", COMMAND).model == "teacher"
        with pytest.raises(ValueError, match="status 404 .*give the address of a server of vLLM"):
            Client(f"{url}/somewhere").get("/version")


@pytest.mark.parametrize(
    ("version", "wanted"),
    [
        ("0.22.0", "vLLM 0.22.0 gives hidden states of other tokens, or too few"),
        ("0.17.0rc1", "0.17.0rc1 gives"),
        ("unknown", "its version is 'unknown', which is none of vLLM"),
    ],
)
def test_versions_with_known_faults_are_refused(version: str, wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        check_version(version, "--url U")


def test_versions_that_were_not_read_are_told() -> None:
    assert [check_version(each, "U") for each in ("0.23.0", "0.33.0", "0.33.1", "1.0")] == [
        False,
        False,
        True,
        True,
    ]


def test_what_killed_producers_left_is_removed(tmp_path: Path) -> None:
    names = (f"cmpl-{NAME_TAG}1.safetensors", f"cmpl-{NAME_TAG}2.safetensors.lock", "cmpl-others.safetensors")
    for name in (*names, f"cmpl-{NAME_TAG}new.safetensors"):
        (tmp_path / name).touch()
    for name in names:
        os.utime(tmp_path / name, (0, 0))
    assert StateFiles(tmp_path, Client("http://x").stopped).sweep() == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"cmpl-{NAME_TAG}new.safetensors", names[2]]
