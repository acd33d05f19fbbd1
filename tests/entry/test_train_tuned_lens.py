"""examples/extend/train_tuned_lens.py: what it learns does not depend on the layout, and a run takes its file."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

import examples.extend.tuned_lens  # noqa: F401  # adds the lens
from megatron_fdd.step.teacher.lens_file import LensFile
from tests.entry.command import trained
from tests.entry.conftest import Toys
from tests.harness.ranks import Layout, run_on_ranks

pytestmark = pytest.mark.tier("all")

TRAINING = (
    "--seq-length 16 --micro-batch-size 2 --global-batch-size 4 --train-iters 8 --lr 2e-2 --eval-iters 2 "
    "--split 80,20,0 --tokenizer-type HuggingFaceTokenizer --seed 7"
).split()


def train(flags: list[str]) -> tuple[int, str]:
    """Body on every rank: the script's own `main`. Exit status, and what was printed."""
    from examples.extend import train_tuned_lens  # which starts a rehearsal: not in the process of the tests

    out, err = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", ["train_tuned_lens", *flags]),
        patch("megatron_fdd.host.process.PATIENCE_S", 0),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        status = train_tuned_lens.main()
    return status, out.getvalue() + err.getvalue()


def learned(toy: Toys, out: Path, *layout: str) -> dict[str, Any]:
    own = ["--lens-out", out, "--blocks", "2,4", "--"]
    places = ["--teacher-load", toy.teacher, "--data-path", toy.data, "--tokenizer-model", toy.tokenizer]
    flags = [*map(str, own), *TRAINING, *map(str, places), *layout]
    for status, printed in run_on_ranks(train, Layout(ranks=2), {"flags": flags}):
        assert status == 0, printed
    row: dict[str, Any] = json.loads(out.with_name(f"{out.name}.json").read_text())
    return row


def test_a_lens_is_learned_alike_at_two_layouts(toy: Toys, tmp_path: Path) -> None:
    rows = [
        learned(toy, tmp_path / "shared", "--tensor-model-parallel-size", "2", "--sequence-parallel"),
        learned(toy, tmp_path / "copied"),
    ]
    for name in ("kl_bare", "kl_tuned"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-4)
    for block, bare in rows[0]["kl_bare"].items():
        assert rows[0]["kl_tuned"][block] < 0.9 * bare
    assert rows[0]["training_tokens"] == rows[1]["training_tokens"] == 8 * 4 * 16
    assert LensFile.open(tmp_path / "shared").num_bytes == {2: 4 * 48 * 49, 4: 4 * 48 * 49}
    flags = ("--fdd-plugin", "examples.extend.tuned_lens", "--teacher-lens", tmp_path / "shared")
    trained(toy.command(*flags, "--fdd-dry-run"))
    [(status, printed), *_] = run_on_ranks(
        train, Layout(ranks=2), {"flags": ["--lens-out", "x", "--blocks", "2"]}
    )
    assert status == 1
    assert "train_tuned_lens: error: " in printed
