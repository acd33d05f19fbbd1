"""Checkpoints that run code when they are unpickled, or whose index lies: refused by name, and nothing runs."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import pickle
import re
import signal
from collections.abc import Callable
from pathlib import Path, PosixPath

import numpy as np
import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint import FileSystemReader

from megatron_fdd.cli import main
from megatron_fdd.host import unpickling
from megatron_fdd.host.checkpoint import (
    check_no_spec,
    check_objects_together,
    find_checkpoint,
    read_checkpoint_args,
)
from megatron_fdd.host.checkpoint_index import check_objects, read_checkpoint_index
from megatron_fdd.host.damage import DAMAGE, cause_of
from tests.harness.ranks import distributed
from tests.hostile import checkpoints
from tests.hostile.checkpoints import (
    CHANGED_CLASS,
    CLASS,
    COMMON,
    INDICES,
    OBJECTS,
    ODD_OBJECTS,
    PLACES,
    UNLISTED,
    Payload,
)


@pytest.mark.parametrize("place", PLACES)
def test_a_payload_is_refused_by_file_and_class(place: str, tmp_path: Path) -> None:
    make, where = PLACES[place]
    make(tmp_path / "made", Payload(tmp_path / "sign"))
    pattern = rf"^--teacher-load .*{where} names the class {CLASS}, .* give --fdd-trust-checkpoint$"
    for to_plan in (False, True):
        with pytest.raises(ValueError, match=pattern):
            find_checkpoint(str(tmp_path / "made"), "--teacher-load", to_plan=to_plan)
    assert not (tmp_path / "sign").exists()


@pytest.mark.parametrize("place", ["whole index", "common.pt of older versions", COMMON])
def test_megatrons_own_readers_run_nothing_either(place: str, tmp_path: Path) -> None:
    """A checkpoint that nobody has checked before, such as one that was exchanged after the check."""
    unpickling.restrict_unpickling()
    PLACES[place][0](tmp_path / "made", Payload(tmp_path / "sign"))
    with pytest.raises(DAMAGE):
        dist_checkpointing.load_common_state_dict(str(tmp_path / "made" / "release"))
    if "index" in place:
        with pytest.raises(unpickling.ForbiddenClassError, match=CLASS):
            FileSystemReader(tmp_path / "made" / "release").read_metadata()
    assert not (tmp_path / "sign").exists()


@checkpoints.untrusting()
def test_the_payloads_run_where_checkpoints_are_trusted(tmp_path: Path) -> None:
    """What the tests above prove is worth something: without the restriction the code does run."""
    unpickling.trust_checkpoints()
    for number, place in enumerate(("whole index", "common.pt of older versions", COMMON)):
        sign = tmp_path / f"sign{number}"
        PLACES[place][0](tmp_path / f"made{number}", Payload(sign))
        with contextlib.suppress(ValueError):  # there is no index, or there are no arguments
            read_checkpoint_args(find_checkpoint(str(tmp_path / f"made{number}"), "--load"), "--load")
        assert sign.is_dir()


@pytest.mark.parametrize("place", [place for place in PLACES if place != "whole index"])
@checkpoints.untrusting()
def test_a_harmless_class_on_no_list_is_refused_unless_trusted(place: str, tmp_path: Path) -> None:
    make, where = PLACES[place]
    make(tmp_path / "made", UNLISTED)
    with pytest.raises(
        ValueError, match=rf"{where} names the class fractions\.Fraction, .* --fdd-trust-checkpoint$"
    ):
        find_checkpoint(str(tmp_path / "made"), "--load")
    unpickling.trust_checkpoints()
    path = find_checkpoint(str(tmp_path / "made"), "--load")
    assert repr(UNLISTED) in repr(checkpoints.everything(path))


def test_an_object_that_nobody_has_checked_is_named_too(tmp_path: Path) -> None:
    """A checkpoint that was exchanged after the check, or a non-persistent one."""
    unpickling.restrict_unpickling()
    path = checkpoints.make(tmp_path, **{OBJECTS[1]: UNLISTED}) / "release"
    with pytest.raises(DAMAGE) as caught:
        checkpoints.everything(path)
    assert cause_of(caught.value).startswith("it names the class fractions.Fraction, which is on no list")


@pytest.mark.parametrize("place", OBJECTS)
def test_what_is_left_to_all_ranks(place: str, tmp_path: Path) -> None:
    """Index and common state are checked by every rank, the other objects by the rank that has their file."""
    for number in range(3):
        changes = {place: [{"args": Payload(tmp_path / "sign")}]} if number == 1 else {}
        checkpoints.make(tmp_path / f"made{number}", **changes)
    folder = checkpoints.joined(*(tmp_path / f"made{number}" for number in range(3)))
    refused = pytest.raises(ValueError, match=f"names the class {CLASS}")
    with refused if place == COMMON else contextlib.nullcontext():
        find_checkpoint(str(folder), "--load", leaves_objects=True)
    path = folder / "release"
    for rank in range(4):
        with refused if rank == 1 else contextlib.nullcontext():
            check_objects(path, "--load", read_checkpoint_index(path, "--load"), share=slice(rank, None, 4))
    assert not (tmp_path / "sign").exists()


@distributed(ranks=2)
def test_every_rank_refuses_what_one_has_found(tmp_path: Path) -> None:
    if dist.get_rank() == 0:
        for number in range(2):
            changes = {OBJECTS[1]: Payload(tmp_path / "sign")} if number else {}
            checkpoints.make(tmp_path / f"made{number}", **changes)
        checkpoints.joined(*(tmp_path / f"made{number}" for number in range(2)))
    dist.barrier()
    path = find_checkpoint(str(tmp_path / "made0"), "--load", leaves_objects=True)
    with pytest.raises(ValueError, match=rf"--load .*__1_0\.distcp: .* names the class {CLASS}"):
        check_objects_together({"--load": path})
    assert not (tmp_path / "sign").exists()


def test_a_trusted_checkpoint_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoints.make(tmp_path) / "release"
    index = read_checkpoint_index(path, "--load")
    (path / "__0_0.distcp").unlink()
    with pytest.raises(FileNotFoundError):
        check_objects(path, "--load", index)
    monkeypatch.setattr(unpickling, "_is_trusting", True)
    check_objects(path, "--load", index)


def test_a_harmless_checkpoint_is_read(tmp_path: Path) -> None:
    folder = find_checkpoint(str(checkpoints.make(tmp_path)), "--load")
    assert read_checkpoint_args(folder, "--load").num_layers == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64])
def test_an_index_of_any_dtype_is_read(dtype: torch.dtype) -> None:
    assert unpickling.load_index(io.BytesIO(pickle.dumps({"dtype": dtype}))) == {"dtype": dtype}


@pytest.mark.parametrize("name", ODD_OBJECTS)
def test_an_odd_object_of_harmless_classes(name: str, tmp_path: Path) -> None:
    made, said = ODD_OBJECTS[name]
    folder = checkpoints.make(tmp_path, **{COMMON: [{"args": argparse.Namespace(num_layers=made)}]})
    with pytest.raises(ValueError, match=rf"__0_0\.distcp: {COMMON} .*{re.escape(said)}"):
        find_checkpoint(str(folder), "--load")
    assert signal.SIGKILL._value_ == 9


def test_random_states_of_numpy_are_read() -> None:
    content = io.BytesIO()
    torch.save(np.random.RandomState(1).get_state(), content)
    unpickling.restrict_unpickling()
    unpickling.check_object(content.getvalue())
    content.seek(0)
    found = torch.load(content, weights_only=True)
    assert np.array_equal(found[1], np.random.RandomState(1).get_state()[1])


def test_an_index_that_changes_a_class(tmp_path: Path) -> None:
    folder = checkpoints.make(tmp_path)
    (folder / "release" / ".metadata").write_bytes(CHANGED_CLASS)
    before = dict(vars(PosixPath))
    with pytest.raises(ValueError, match=r"\.metadata cannot be read \(it changes .*PosixPath.* itself"):
        find_checkpoint(str(folder), "--load")
    assert dict(vars(PosixPath)) == before


@pytest.mark.parametrize("name", ["__0_0.distcp", "metadata.json", "common.pt"])
def test_a_pipe_is_not_waited_for(name: str, tmp_path: Path) -> None:
    folder = checkpoints.make(tmp_path)
    (folder / "release" / name).unlink(missing_ok=True)
    os.mkfifo(folder / "release" / name)
    with pytest.raises(ValueError, match=rf"{name} is no regular file; (copy or save|the copy is damaged)"):
        find_checkpoint(str(folder), "--load")


@pytest.mark.parametrize("name", INDICES)
def test_an_index_that_lies(name: str, tmp_path: Path) -> None:
    change, text = INDICES[name]
    folder = checkpoints.with_index(checkpoints.make(tmp_path), change)
    with pytest.raises(ValueError, match=rf"--load .*\.metadata cannot be read \(.*{text}"):
        find_checkpoint(str(folder), "--load")


_JSON = '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'
# What is put in the place of metadata.json, and what is said of it.
FORMATS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pipe": (os.mkfifo, "metadata.json is no regular file; .* copy it again"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "metadata.json is no regular file"),
    "a folder": (lambda path: path.mkdir(), "metadata.json is no regular file"),
    "nothing": (lambda path: None, "metadata.json is missing; .* copy it again"),
    "no bytes": (lambda path: path.touch(), "metadata.json is not valid JSON: .*; copy or make it again"),
    "a list": (lambda path: path.write_text("[]"), "metadata.json must hold a JSON object, not a list; copy"),
    "another format": (
        lambda path: path.write_text(_JSON.replace("torch_dist", "zarr")),
        "metadata.json has sharded_backend 'zarr' and must have 'torch_dist': another format is not read",
    ),
    "another version": (
        lambda path: path.write_text(_JSON.replace("1", '"x"')),
        "metadata.json has sharded_backend_version 'x' and must have 1",
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_that_is_none(name: str, tmp_path: Path) -> None:
    """Megatron opens this file by its name, and would wait for a pipe."""
    put, text = FORMATS[name]
    path = checkpoints.make(tmp_path) / "release" / "metadata.json"
    path.unlink()
    put(path)
    with pytest.raises(ValueError, match=rf"^--load .*{text}"):
        find_checkpoint(str(tmp_path), "--load")


def test_arguments_of_older_versions_in_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(checkpoints.make(tmp_path) / "release" / "common.pt")
    with pytest.raises(ValueError, match=r"common\.pt is no regular file"):
        find_checkpoint(str(tmp_path), "--load")


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
    folder = checkpoints.make(tmp_path / "run", **{COMMON: [{"args": Payload(tmp_path / "sign")}]})
    (folder / "release").rename(folder / "iter_0000003")
    (folder / "latest_checkpointed_iteration.txt").write_text("3")
    (folder / "metrics.jsonl").write_text('{"iteration": 1, "total": 1.0}\n')
    result = CliRunner().invoke(main, ["report", str(folder), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1, "a script that makes reports sees it"
    assert re.match(
        rf"^report: error: run: RUN .*{CLASS}.* give --fdd-trust-checkpoint; the report was written without",
        result.stderr,
    )
    assert CLASS in (tmp_path / "out/report.md").read_text()
    assert not (tmp_path / "sign").exists()


def test_a_report_of_a_run_whose_first_save_has_not_ended(tmp_path: Path) -> None:
    (tmp_path / "run/iter_0000002").mkdir(parents=True)
    (tmp_path / "run/metrics.jsonl").write_text('{"iteration": 1, "total": 1.0}\n')
    result = CliRunner().invoke(main, ["report", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    assert (result.exit_code, result.stderr) == (0, "")


@checkpoints.untrusting()
def test_a_report_of_a_trusted_checkpoint(tmp_path: Path) -> None:
    """The remedy that the remark names is a flag of the command."""
    args = argparse.Namespace(num_layers=2, hidden_size=8, num_attention_heads=2, train_iters=77)
    args.own = Payload(tmp_path / "sign")
    folder = checkpoints.make(tmp_path / "run", **{COMMON: [{"args": args}]})
    (folder / "release").rename(folder / "iter_0000003")
    (folder / "latest_checkpointed_iteration.txt").write_text("3")
    (folder / "metrics.jsonl").write_text('{"iteration": 1, "total": 1.0}\n')
    words = ["report", str(folder), "--out", str(tmp_path / "out"), "--fdd-trust-checkpoint"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert "| --train-iters | 77 |" in (tmp_path / "out/report.md").read_text()
    assert (tmp_path / "sign").is_dir()
