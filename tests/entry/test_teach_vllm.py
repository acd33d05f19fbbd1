"""`--engine vllm` from the command line, against a stand-in for a server."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_fdd.data.store.store import Store
from tests.entry.command import teach
from tests.entry.conftest import Toys
from tests.teach.engines import plain_states
from tests.teach.vllm_server import StandIn, serving

ALL = pytest.mark.tier("all")
BLOCKS = (2, 4, 6)
# Two programs' sums of float32.
SAME_STATES = 1e-5


@pytest.fixture
def stand_in(toy: Toys, tmp_path: Path) -> StandIn:
    folder, teacher = tmp_path / "states", toy.root / "teacher-hf"
    folder.mkdir()
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    return StandIn(model, folder, BLOCKS, str(teacher))


def words(toy: Toys, tmp_path: Path, *more: object) -> list[object]:
    """Return a producer's flags but for the server."""
    own = ("--teacher", toy.root / "teacher-hf", "--store", tmp_path / "store", "--form", "float32")
    return [*own, "--blocks", "2,4", "--batch-tokens", 64, *toy.command(*more)]


def check_store(path: Path, stand_in: StandIn) -> None:
    """Compare a store with the model; and that nothing of the server's files is left."""
    assert list(stand_in.folder.iterdir()) == []
    made = Store.open(path, "--store")
    assert (made.identity.engine, made.identity.ran["vllm"], len(made.index)) == ("vllm", "0.33.0", 24)
    texts = {tuple(body["prompt"]) for body in stand_in.asked if len(body["prompt"]) == 16}
    assert len(texts) == 24
    for text in texts:
        ids = np.array(text, np.int32)
        found = torch.from_numpy(made.read(ids, (0, 1, 2), 0, len(ids))).view(torch.float32)
        states, _ = plain_states(stand_in.model, ids)
        for row, block in zip(found, BLOCKS, strict=True):
            torch.testing.assert_close(row, states[block - 1], atol=SAME_STATES, rtol=0)


def test_a_server_fills_a_store(toy: Toys, tmp_path: Path, stand_in: StandIn) -> None:
    with serving(stand_in) as url:
        done = teach("vllm", "--url", url, "--hidden-states", stand_in.folder, *words(toy, tmp_path))
    assert done.returncode == 0, done.stderr
    assert "lens: norm and head give the teacher's own logits to" in done.stdout
    check_store(tmp_path / "store", stand_in)


@ALL
def test_a_server_that_went_away_goes_on(toy: Toys, tmp_path: Path, stand_in: StandIn) -> None:
    """After the first text, that of the lens, and two batches of four units; no segment was closed then."""
    stand_in.most = 10
    with serving(stand_in) as url:
        flags = ("--url", url, "--hidden-states", stand_in.folder, *words(toy, tmp_path))
        ended = teach("vllm", *flags)
        assert ended.returncode == 1
        [line] = ended.stderr.splitlines()
        assert "no server answers there" in line
        stand_in.most = None
        done = teach("vllm", *flags)
    assert done.returncode == 0, done.stderr
    check_store(tmp_path / "store", stand_in)


@ALL
def test_the_command_of_the_server_is_printed(toy: Toys, tmp_path: Path) -> None:
    looked = teach("vllm", *words(toy, tmp_path, "--dry-run"))
    assert looked.returncode == 0, looked.stderr
    command = r"a server of vLLM for this: vllm serve \S+teacher-hf --port 8000 --dtype float32 "
    assert re.search(command, looked.stdout)
    assert '"eagle_aux_hidden_state_layer_ids": [2, 4, 6]' in looked.stdout
    alone = teach("vllm", *words(toy, tmp_path))
    assert alone.returncode == 1
    [line] = alone.stderr.splitlines()
    assert "vLLM is not installed here, and no server is named: start one with: vllm serve" in line
