"""Lens files: what is written is read, and what does not fit a run is refused before any rank talks to another."""

from __future__ import annotations

import argparse
import hashlib
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_fdd.losses.lens import LENSES, Lens, LensKind, Norm, TeacherLens, add_lens
from megatron_fdd.step.teacher.lens_file import LensFile, TeacherIdentity, write_lens

TEACHER = TeacherIdentity(num_layers=6, hidden_size=4, final_norm="ab" * 32)
AFFINE = LensKind({"weight": "TT", "bias": "T"}, lambda hidden, tensors, norm: norm(hidden))
LOW_RANK = LensKind({"down": "RT", "up": "TR"}, lambda hidden, tensors, norm: norm(hidden))


@pytest.fixture(autouse=True)
def _known_lenses() -> object:
    with patch.dict(LENSES, {"affine": AFFINE, "low_rank": LOW_RANK}):
        yield


def affine(*blocks: int, width: int = 4, dtype: torch.dtype = torch.float32) -> dict[int, dict[str, Tensor]]:
    return {
        block: {
            "weight": torch.full((width, width), block, dtype=dtype),
            "bias": torch.ones(width, dtype=dtype),
        }
        for block in blocks
    }


def test_what_is_written_is_read(tmp_path: Path) -> None:
    tensors = affine(2) | affine(4, dtype=torch.bfloat16)
    write_lens(tmp_path / "new" / "lens", "affine", TEACHER, tensors)
    file = LensFile.open(tmp_path / "new" / "lens")
    assert (file.lens, file.teacher, file.num_bytes) == ("affine", TEACHER, {2: 80, 4: 40})
    file.check(TEACHER, {2, 4})
    file.check(replace(TEACHER, final_norm=""), {4})  # a plan of a teacher whose weights are not there
    with patch("torch.cuda.current_device", lambda: "cpu"):
        (loaded,) = file.load({4}).values()
    assert loaded.keys() == {"weight", "bias"}
    assert all(torch.equal(loaded[name], tensors[4][name]) for name in loaded)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["lens"]


@pytest.mark.parametrize(
    ("teacher", "blocks", "message"),
    [
        (replace(TEACHER, num_layers=8), {2}, "its num_layers is 6, and that of this run's teacher 8"),
        (replace(TEACHER, hidden_size=8), {2}, "its hidden_size is 4, and that of this run's teacher 8"),
        (replace(TEACHER, final_norm="cd" * 32), {2}, "its final_norm is abababababab..., and that of"),
        (TEACHER, {2, 3, 5}, "no tensors for the teacher's blocks [3, 5], only for [2, 4]"),
    ],
)
def test_a_file_of_another_run_is_refused(
    tmp_path: Path, teacher: TeacherIdentity, blocks: set[int], message: str
) -> None:
    write_lens(tmp_path / "lens", "affine", TEACHER, affine(2, 4))
    with pytest.raises(ValueError, match=re.escape(message)):
        LensFile.open(tmp_path / "lens").check(teacher, blocks)


HEADER = {"lens": "affine", "num_layers": "6", "hidden_size": "4", "final_norm": TEACHER.final_norm}


@pytest.mark.parametrize(
    ("header", "tensors", "message"),
    [
        ({"format": "pt"}, {"2.bias": torch.zeros(4)}, "is no lens file (KeyError: 'lens')"),
        (HEADER, {"2.weight": torch.zeros(4, 4, dtype=torch.int8)}, "is no lens file (KeyError: 'I8')"),
        (HEADER, {"weight": torch.zeros(4, 4)}, "is no lens file (ValueError: "),
        (HEADER | {"lens": "other"}, {}, "of a lens 'other', which nothing has added; name the module"),
        (HEADER, {"2.weight": torch.zeros(4, 4)}, "block 2 has tensors ['weight']; a lens 'affine' needs"),
        (HEADER, {"2.weight": torch.zeros(4, 4), "2.bias": torch.zeros(4, 1)}, "2.bias has the shape [4, 1]"),
        (HEADER, {"2.weight": torch.zeros(4, 5), "2.bias": torch.zeros(4)}, "2.weight has the shape [4, 5]"),
        (
            HEADER,
            {"2.weight": torch.zeros(4, 4), "2.bias": torch.full((4,), math.inf)},
            "2.bias has numbers that are not finite; make the lens again",
        ),
        (
            HEADER | {"lens": "low_rank"},
            {"2.down": torch.zeros(2, 4), "2.up": torch.zeros(4, 3)},
            "2.up has the shape [4, 3]; a lens 'low_rank' needs TR with {'T': 4, 'R': 2}",
        ),
    ],
)
def test_a_file_that_is_not_right_in_itself_is_refused(
    tmp_path: Path, header: dict[str, str], tensors: dict[str, Tensor], message: str
) -> None:
    save_file(tensors, tmp_path / "lens", header)
    with pytest.raises(ValueError, match=re.escape(message)):
        LensFile.open(tmp_path / "lens").check(TEACHER, {2})


def test_what_is_no_file_of_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such file"):
        LensFile.open(tmp_path)
    (tmp_path / "text").write_text("a lens, perhaps")
    with pytest.raises(ValueError, match="is no lens file"):
        LensFile.open(tmp_path / "text")


def test_each_block_may_have_its_own_rank(tmp_path: Path) -> None:
    blocks = {
        block: {"down": torch.zeros(rank, 4), "up": torch.zeros(4, rank)} for block, rank in ((1, 1), (5, 3))
    }
    write_lens(tmp_path / "lens", "low_rank", TEACHER, blocks)
    LensFile.open(tmp_path / "lens").check(TEACHER, {1, 5})


@pytest.mark.parametrize("wrong", [torch.tensor(float("nan")), torch.zeros(3)])
def test_a_wrong_lens_is_not_written(tmp_path: Path, wrong: Tensor) -> None:
    blocks = affine(2)
    blocks[2]["bias"] = wrong.expand(3)
    with pytest.raises(ValueError, match="2.bias"):
        write_lens(tmp_path / "lens", "affine", TEACHER, blocks)
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_is_known_by_its_final_norm(tmp_path: Path) -> None:
    args, name = argparse.Namespace(num_layers=6, hidden_size=4), "decoder.final_layernorm.weight"
    found = []
    for folder, dtype in (("one", torch.bfloat16), ("two", torch.float32), ("other", torch.float32)):
        weight = torch.arange(4, dtype=dtype) + (folder == "other")
        torch.distributed.checkpoint.save({name: weight}, checkpoint_id=tmp_path / folder, no_dist=True)
        found.append(TeacherIdentity.read(tmp_path / folder, args))
    digest = hashlib.sha256(torch.arange(4.0).numpy().tobytes()).hexdigest()
    assert found[0] == found[1] == TeacherIdentity(6, 4, digest)
    assert found[2].final_norm not in ("", digest)


@pytest.mark.parametrize(
    ("name", "tensors", "message"),
    [
        ("affine", {"weight": "TT"}, "'affine' exists already"),
        ("two words", {"weight": "TT"}, "cannot be called 'two words'"),
        ("empty", {}, "must name at least one"),
        ("texts", ["w"], "must name at least one"),
        ("numbers", {"w": 2}, "must name at least one"),
        (7, {"w": "TT"}, "cannot be called 7"),
        ("scalar", {"scale": ""}, "a letter for each of its dimensions"),
        ("dotted", {"a.b": "T"}, "without '.'"),
    ],
)
def test_a_kind_that_cannot_be_written_down_is_refused(
    name: str, tensors: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        add_lens(name, LensKind(tensors, AFFINE.features))


def test_features_of_another_shape_are_refused() -> None:
    def first_row(hidden_NT: Tensor, _tensors: object, norm: Norm) -> Tensor:
        return norm(hidden_NT[:1])

    lens = TeacherLens(Lens(torch.zeros(8, 4), None), LensKind({"a": "T"}, first_row), {2: {}})
    with pytest.raises(ValueError, match=re.escape("made features [1, 4] of hidden states [6, 4]")):
        lens.features(torch.zeros(3, 2, 4), 2)


def test_features_that_fail_or_are_none_are_refused() -> None:
    with pytest.raises(
        ValueError, match=re.escape("features: it must be a function that takes (hidden_NT, tensors")
    ):
        add_lens("short", LensKind({"a": "T"}, lambda hidden_NT: hidden_NT))  # type: ignore[arg-type,misc]
    with pytest.raises(ValueError, match="must be a LensKind: 7 is none"):
        add_lens("number", 7)  # type: ignore[arg-type]
    for features, message in (
        (lambda *_: 1 / 0, "the lens: features fails with ZeroDivisionError"),
        (lambda *_: None, "the lens made None of hidden states"),
    ):
        kind: Any = LensKind({"a": "T"}, features)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=message):
            TeacherLens(Lens(torch.zeros(8, 4), None), kind, {2: {}}).features(torch.zeros(3, 2, 4), 2)
