"""`fdd export --watch` beside a training: each checkpoint as a folder with a card, and an end with the training."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.entry.command import trained
from tests.entry.conftest import Toys
from tests.harness import forked_python

pytestmark = pytest.mark.tier("all")
ROOT = Path(__file__).parents[2]


def test_every_checkpoint_of_a_running_training(toy: Toys, tmp_path: Path) -> None:
    save, out = tmp_path / "save", tmp_path / "exports"
    command = [
        forked_python.python(),
        str(ROOT / "tools" / "mcore_to_hf.py"),
        "--watch",
        "--idle-timeout",
        "100",
    ]
    command += ["--load", str(save), "--hf-out", str(out)]
    with subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True
    ) as watch:
        trained(toy.saving_command(save, "--train-iters", 4, "--fdd-beta", 0.5))
        said, _ = watch.communicate(timeout=100)
    lines = said.splitlines()
    assert lines[0].startswith(f"watching {save}")
    assert lines[-1] == f"{out}: 2 checkpoint(s) of {save} exported; the training has ended with iteration 4"
    assert watch.returncode == 0
    assert sorted(path.name for path in out.iterdir()) == ["iter_0000002", "iter_0000004"]
    for path in out.iterdir():
        assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(
            os.listdir(path)
        )
    card = (out / "iter_0000004/README.md").read_text()
    digest = json.loads(toy.data.with_suffix(".prepared.json").read_text())["content_sha256"]
    assert "# save, iteration 4\n" in card
    assert "| iteration | 4 of 4 |\n" in card
    assert "| teacher | `teacher`: LlamaForCausalLM, 6 layers, " in card
    assert "| `--fdd-beta` | 0.5 |\n" in card
    assert "| `text` | text | 200 | " in card
    assert f" | {digest} |\n" in card
