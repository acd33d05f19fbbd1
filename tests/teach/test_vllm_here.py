"""vLLM in this process, by a stand-in for its package; and the command that starts a server."""

from __future__ import annotations

import json
import shlex
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.tiny_teachers import WIDTH, tiny_model
from megatron_fdd.losses.pairs import sample_blocks
from megatron_fdd.teach.hf_parts import find_parts
from megatron_fdd.teach.vllm.checks import Expected
from megatron_fdd.teach.vllm.in_process import LocalSource
from megatron_fdd.teach.vllm.settings import ANY_FOLDER, VllmSettings
from tests.harness.markdown import pages
from tests.teach.engines import BLOCKS, engine_of, units
from tests.teach.vllm_server import StandIn


def settings(folder: Path, **changes: Any) -> VllmSettings:
    plain = {
        "teacher": Path("models/large one"),
        "blocks": BLOCKS,
        "folder": folder,
        "longest": 128,
        "positions": 4096.0,
    }
    return VllmSettings(**{**plain, "dtype": "float32", **changes})  # type: ignore[arg-type]


def fake_vllm(stand_in: StandIn, told: dict[str, Any]) -> types.ModuleType:
    """Make a module with what `LocalSource` uses of vLLM."""

    class LLM:
        def __init__(self, **given: Any) -> None:
            told.update(given)

        def generate(self, prompts: list[Any], wanted: list[Any], use_tqdm: bool) -> list[Any]:
            results = []
            for number, (prompt, sampling) in enumerate(zip(prompts, wanted, strict=True)):
                body = {"prompt": prompt["prompt_token_ids"], "request_id": str(number), **sampling}
                reply = stand_in.answer(body)
                logprobs = reply["choices"][0]["prompt_logprobs"]
                if logprobs is not None:  # vLLM's own objects
                    logprobs = [None] + [
                        {int(key): types.SimpleNamespace(**value) for key, value in each.items()}
                        for each in logprobs[1:]
                    ]
                made = types.SimpleNamespace(
                    kv_transfer_params=reply["kv_transfer_params"],
                    prompt_token_ids=prompt["prompt_token_ids"],
                    prompt_logprobs=logprobs,
                )
                results.append(made)
            return results

    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams, module.__version__ = LLM, dict, "0.33.0"  # type: ignore[attr-defined]
    return module


def test_units_run_in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, told = tiny_model("llama"), {}
    stand_in = StandIn(model, tmp_path, BLOCKS, "teacher")
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm(stand_in, told))
    source = LocalSource(settings(tmp_path, positions=128))
    assert (told["max_model_len"], told["enable_prefix_caching"], told["dtype"]) == (129, False, "float32")
    assert told["kv_transfer_config"]["kv_connector_extra_config"] == {"shared_storage_path": str(tmp_path)}
    texts, expected = units(), Expected(source.source, BLOCKS, WIDTH, torch.float32)
    asked: list[Any] = []

    def finish(answer: Any) -> Any:
        asked.append(answer.logprobs)
        return np.ascontiguousarray(answer.states_SLT.transpose(0, 1).contiguous().view(torch.uint8).numpy())

    found = source.ask(texts, expected, [0], finish)
    for mine, own in zip(found, engine_of(model, find_parts(model)).states(texts), strict=True):
        np.testing.assert_allclose(mine.view(np.float32), own.view(np.float32), atol=1e-5)
    assert [each is None for each in asked] == [False, True, True, True]
    assert list(tmp_path.iterdir()) == []


def test_a_vllm_that_does_not_start_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("vllm")
    module.SamplingParams, module.__version__ = dict, "0.33.0"  # type: ignore[attr-defined]

    def failing(**_given: Any) -> None:
        raise RuntimeError("no room\nfor weights")

    module.LLM = failing  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    with pytest.raises(
        ValueError, match=r"does not start here \(RuntimeError: no room for weights\); start a"
    ):
        LocalSource(settings(tmp_path))


def test_the_command_of_a_server(tmp_path: Path) -> None:
    words = shlex.split(settings(tmp_path).command(8001))
    assert words[:5] == ["vllm", "serve", "models/large one", "--port", "8001"]
    given = dict(zip(words[5::2], words[6::2], strict=False))
    assert (given["--dtype"], given["--max-model-len"]) == ("float32", "129")
    speculative = json.loads(words[words.index("--speculative-config") + 1])
    assert speculative["draft_model_config"]["hf_config"]["eagle_aux_hidden_state_layer_ids"] == list(BLOCKS)
    assert json.loads(words[words.index("--kv-transfer-config") + 1])["kv_role"] == "kv_producer"
    long = settings(tmp_path, positions=128).command(8001)
    assert long.startswith("VLLM_ALLOW_LONG_MAX_MODEL_LEN=1 vllm serve ")


def test_the_page_has_the_command_that_is_printed() -> None:
    page = next(page for page in pages("docs/*.md") if page.path.name == "teaching-from-vllm.md")
    [shown] = [block.strip() for block in page.blocks("bash") if block.startswith("vllm serve")]
    blocks = sorted({*sample_blocks("paper", 4, 61, "teacher"), 61})
    made = settings(
        ANY_FOLDER,
        teacher=Path("teacher-hf"),
        blocks=blocks,
        longest=4096,
        positions=163840,
        dtype="bfloat16",
    )
    assert made.command(8000) == shown
