"""Checkpoints that run code when they are unpickled, or whose index lies: refused by name, and nothing runs."""

from __future__ import annotations

import argparse
import io
import pickle
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint import FileSystemReader, filesystem

from megatron_fdd.evaluate.report.runs import read_runs
from megatron_fdd.host import unpickling
from megatron_fdd.host.checkpoint import check_no_spec, find_checkpoint, read_checkpoint_args
from megatron_fdd.host.damage import DAMAGE
from tests.hostile import checkpoints
from tests.hostile.checkpoints import CLASS, COMMON, INDICES, PAYLOADS


@pytest.mark.parametrize("place", PAYLOADS)
def test_a_payload_is_refused_by_file_and_class(place: str, tmp_path: Path) -> None:
    make, where = PAYLOADS[place]
    make(tmp_path / "made", tmp_path / "sign")
    pattern = rf"^--teacher-load .*{where} names the class {CLASS}, .* give --fdd-trust-checkpoint$"
    for to_plan in (False, True):
        with pytest.raises(ValueError, match=pattern):
            find_checkpoint(str(tmp_path / "made"), "--teacher-load", to_plan=to_plan)
    assert not (tmp_path / "sign").exists()


@pytest.mark.parametrize("place", ["whole index", "common.pt of older versions", COMMON])
def test_megatrons_own_readers_run_nothing_either(place: str, tmp_path: Path) -> None:
    """A checkpoint that nobody has checked before, such as one that was exchanged after the check."""
    unpickling.restrict_unpickling()
    PAYLOADS[place][0](tmp_path / "made", tmp_path / "sign")
    with pytest.raises(DAMAGE):
        dist_checkpointing.load_common_state_dict(str(tmp_path / "made" / "release"))
    if "index" in place:
        with pytest.raises(unpickling.ForbiddenClassError, match=CLASS):
            FileSystemReader(tmp_path / "made" / "release").read_metadata()
    assert not (tmp_path / "sign").exists()


def test_the_payloads_run_where_checkpoints_are_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the tests above prove is worth something: without the restriction the code does run."""
    monkeypatch.setattr(filesystem, "pickle", pickle)
    monkeypatch.setattr(unpickling, "_is_trusting", False)
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    unpickling.trust_checkpoints()
    for number, place in enumerate(("whole index", COMMON)):
        sign = tmp_path / f"sign{number}"
        PAYLOADS[place][0](tmp_path / f"made{number}", sign)
        with pytest.raises(ValueError, match="no index|stores no arguments"):
            read_checkpoint_args(find_checkpoint(str(tmp_path / f"made{number}"), "--load"), "--load")
        assert sign.is_dir()


def test_a_harmless_checkpoint_is_read(tmp_path: Path) -> None:
    folder = find_checkpoint(str(checkpoints.make(tmp_path)), "--load")
    assert read_checkpoint_args(folder, "--load").num_layers == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64])
def test_an_index_of_any_dtype_is_read(dtype: torch.dtype) -> None:
    assert unpickling.load_index(io.BytesIO(pickle.dumps({"dtype": dtype}))) == {"dtype": dtype}


@pytest.mark.parametrize("name", INDICES)
def test_an_index_that_lies(name: str, tmp_path: Path) -> None:
    change, text = INDICES[name]
    folder = checkpoints.with_index(checkpoints.make(tmp_path), change)
    with pytest.raises(ValueError, match=rf"--load .*\.metadata cannot be read \(.*{text}"):
        find_checkpoint(str(folder), "--load")


def test_the_opposite_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(
        ValueError, match="TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1: lets checkpoints run code; unset"
    ):
        find_checkpoint(str(checkpoints.make(tmp_path)), "--load")


@pytest.mark.parametrize("label", ["\u00b2", "9" * 5000, "-3", "1.5", "iter_3", "\x00\x00"])
def test_a_tracker_that_names_no_iteration(label: str, tmp_path: Path) -> None:
    folder = checkpoints.make(tmp_path)
    (folder / "latest_checkpointed_iteration.txt").write_text(label, encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"latest_checkpointed_iteration\.txt says '.{1,30}', not an iteration"
    ):
        find_checkpoint(str(folder), "--load")


@pytest.mark.parametrize("spec", [["os", "system"], "os", 5])
def test_layers_that_are_code_are_not_imported(spec: object) -> None:
    with pytest.raises(ValueError, match=r"--spec (os system|os|5), and nothing is imported by .*; do this"):
        check_no_spec(argparse.Namespace(spec=spec), "--load", "do this")


def test_a_report_runs_nothing(tmp_path: Path) -> None:
    """Nobody expects a report to load anything; it looks for the run's flags."""
    folder = checkpoints.make(
        tmp_path / "run", **{COMMON: [{"args": checkpoints.Payload(tmp_path / "sign")}]}
    )
    (folder / "release").rename(folder / "iter_0000003")
    (folder / "latest_checkpointed_iteration.txt").write_text("3")
    (folder / "metrics.jsonl").write_text('{"iteration": 1, "total": 1.0}\n')
    [run] = read_runs([str(folder)])
    assert CLASS in " ".join(run.remarks)
    assert not (tmp_path / "sign").exists()
