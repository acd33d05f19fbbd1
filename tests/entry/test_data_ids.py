"""Ids that tokenizer, student and teacher do not share: refused at every tensor-parallel size, before or in a step."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from tests.entry import damage
from tests.entry.checks import assert_refused
from tests.entry.command import Patch, run
from tests.entry.conftest import Toys

TENSOR = ["--tensor-model-parallel-size", "2"]


def as_megatron_makes_it(prefix: Path, last: int, then: Sequence[list[int]] = ()) -> list[str]:
    """Write a set whose second document ends with `last`, and others after it; return the flags that name the set."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for ids in ([1, 2, 3] * 40, [*[4] * 16, last], *then):
        builder.add_document(ids, [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return ["--data-path", str(prefix), "--split", "1,0,0"]


def test_refused_before_training(toy: Toys, tmp_path: Path) -> None:
    """The toys' tokenizer has the ids 0 to 90, and both models 99 embeddings."""
    cases = {95: [], 600: TENSOR, -7: TENSOR}
    commands = [
        toy.command(*as_megatron_makes_it(tmp_path / f"own{last}", last), *more)
        for last, more in cases.items()
    ]
    for last, endings in zip(cases, run(*commands), strict=True):
        assert_refused(endings, rf"own{last} has the token id {last}, and ")


def test_refused_by_all_ranks_together(toy: Toys, tmp_path: Path) -> None:
    """No sample holds the id; a plan has looked at no more, and says so."""
    data = as_megatron_makes_it(tmp_path / "own", 95, then=[[5] * 20])
    patches = [Patch("megatron_fdd.data.token_ids", name, 2) for name in ("SAMPLED_IDS", "_PIECES")]
    planned, trained = run(toy.command(*data, "--fdd-dry-run"), toy.command(*data), patches=patches)
    assert [ending.status for ending in planned] == [0, 0]
    assert_refused(trained, r"own has the token id 95, and the tokenizer of this run has 91 ids")


def test_a_teacher_with_fewer_ids(toy: Toys, tmp_path: Path) -> None:
    """Its tokenizer is not stored, so that only the number of its embeddings tells."""
    teacher = damage.with_args(toy.teacher, tmp_path / "t", vocab_size=80)
    shutil.rmtree(teacher / "tokenizer")
    [endings] = run(toy.command("--teacher-load", teacher, *as_megatron_makes_it(tmp_path / "own", 80)))
    assert_refused(endings, r"own has the token id 80, and the teacher has 80 ids \(0 to 79\)")


def accept(*_: Any) -> None:
    """Accept any set, as if its file changed after the check."""


def test_a_batch_is_refused_in_its_step(toy: Toys, tmp_path: Path) -> None:
    data = as_megatron_makes_it(tmp_path / "own", 95)
    places = ("megatron_fdd.data.checks", "megatron_fdd.plan.vocabulary")
    patches = [Patch(place, "check_token_ids", accept) for place in places]
    commands = [toy.command(*data, *more) for more in (TENSOR, ["--pipeline-model-parallel-size", "2"])]
    for endings in run(*commands, patches=patches):
        assert_refused(endings, "iteration 1: a batch has the (token|label) 95, .* share the ids 0 to 90")
