"""Conversions that are stopped, or fail on one rank, on a full disk, or on damaged files: nothing is left half."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_fdd import convert
from megatron_fdd.convert import checksums
from megatron_fdd.convert.hf_writer import check_new_folder, new_folder
from tests.convert import mcore, toys
from tests.harness.ranks import Layout, distributed, run_on_ranks


class _StopError(BaseException):
    """A stand-in for anything that ends a process before it is done."""


@distributed(tp=1)
def test_an_interrupted_conversion_leaves_nothing_behind(tmp_path: Path) -> None:
    mcore.make_checkpoint(tmp_path, "plain")
    before = sorted(tmp_path.rglob("*"))
    written: list[str] = []

    def bytes_of(tensor: torch.Tensor) -> memoryview:
        written.append("")
        if len(written) > 5:
            raise _StopError
        return checksums.bytes_of(tensor)

    stopping = mock.patch("megatron_fdd.convert.hf_writer.bytes_of", bytes_of)
    with stopping, pytest.raises(_StopError):
        convert.mcore_to_hf(tmp_path / "mcore", tmp_path / "out", max_shard_size="1KB")
    assert len(written) == 6
    saving = mock.patch("megatron_fdd.convert.mcore_checkpoint.save_model", side_effect=_StopError)
    with saving, pytest.raises(_StopError):
        convert.hf_to_mcore(tmp_path / "source", tmp_path / "again")
    assert sorted(tmp_path.rglob("*")) == before


def _import_wrong_shapes(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"v_proj.weight of shape \[60, 47\] does not fit config.json"):
        convert.hf_to_mcore(folder / "hf", folder / "mcore")
    assert [path.name for path in folder.iterdir()] == ["hf"]


@pytest.mark.tier("default")
def test_shapes_that_do_not_fit(tmp_path: Path) -> None:
    from megatron_fdd.convert.hf_folder import HfFolder

    source = HfFolder(toys.make_llama(tmp_path / "hf", tokenizer=False))
    tensors = {name: source.read(name) for name in source.tensors}
    tensors["model.layers.1.self_attn.v_proj.weight"] = torch.ones(60, 47)
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    run_on_ranks(_import_wrong_shapes, Layout(tp=1), {"folder": tmp_path})


def _import_a_damaged_copy(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"layers.2.mlp.up_proj.weight is not what checksums.json says"):
        convert.hf_to_mcore(folder / "hf", folder / "mcore")
    assert sorted(path.name for path in folder.iterdir()) == ["hf", "start"]


@pytest.mark.tier("default")
def test_a_flipped_bit_in_a_folder_with_checksums(tmp_path: Path) -> None:
    convert.init_student(toys.make_llama(tmp_path / "start"), [0, 1, 2], tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(path)
    run_on_ranks(_import_and_remove, Layout(ranks=2), {"folder": tmp_path})
    tensors["model.layers.2.mlp.up_proj.weight"].view(torch.int32)[3, 5] ^= 1
    save_file(tensors, path, metadata={"format": "pt"})
    run_on_ranks(_import_a_damaged_copy, Layout(ranks=2), {"folder": tmp_path})


def _import_and_remove(folder: Path) -> None:
    """The undamaged folder is accepted."""
    convert.hf_to_mcore(folder / "hf", folder / "mcore")
    if torch.distributed.get_rank() == 0:
        shutil.rmtree(folder / "mcore")


def _apart(folder: Path) -> None:
    """Each rank has its own file system, and the second one has a folder that a killed run left."""
    rank = torch.distributed.get_rank()
    own = folder / f"node{rank}"
    (own / ".out.incomplete").mkdir(parents=True)
    with pytest.raises(ValueError, match="not the same folder for every rank"):
        convert.mcore_to_hf(folder / "mcore", own / "out")
    with pytest.raises(ValueError, match="not the same folder for every rank"):
        convert.hf_to_mcore(folder / "source", own / "out")
    assert not (own / "out").exists()


@pytest.mark.tier("default")
def test_folders_that_ranks_do_not_share(tmp_path: Path) -> None:
    run_on_ranks(mcore.make_checkpoint, Layout(tp=1), {"folder": tmp_path, "variant": "plain"})
    run_on_ranks(_apart, Layout(ranks=2), {"folder": tmp_path})


def _fail_on_one_rank(folder: Path, place: str, rank: int) -> None:
    """An error on one rank becomes every rank's error, and no files are left."""
    message = "RuntimeError: the disk of one rank"
    failing = torch.distributed.get_rank() == rank
    effect = {"side_effect": RuntimeError("the disk of one rank")} if failing else {}
    before = sorted(folder.rglob("*"))
    torch.distributed.barrier()
    with mock.patch(f"megatron_fdd.convert.{place}", **effect) if failing else contextlib.nullcontext():
        is_import = place.startswith(("to_mcore", "hf_source"))
        convert_one = convert.hf_to_mcore if is_import else convert.mcore_to_hf
        source = folder / ("source" if is_import else "mcore")
        with pytest.raises(ValueError, match=message):
            convert_one(source, folder / "out")
    torch.distributed.barrier()
    assert sorted(folder.rglob("*")) == before


FAILURES = [
    ("hf_source.check_names", 1),
    ("hf_source.HfFolder", 0),
    ("hf_source.digest", 1),
    ("to_mcore.write_companions", 0),
    ("table_export.family_of", 1),
    ("to_hf.write_index", 0),
    ("to_hf.copy_files", 0),
    ("mcore_checkpoint.StoredWeights.read", 1),
]


@pytest.mark.tier("default")
@pytest.mark.parametrize(("place", "rank"), FAILURES)
def test_what_fails_on_one_rank_is_told_by_all(tmp_path: Path, place: str, rank: int) -> None:
    # Every rank reads the biases that the model lacks, so that reading fails before writing.
    run_on_ranks(mcore.make_checkpoint, Layout(tp=1), {"folder": tmp_path, "variant": "attention_bias"})
    arguments = {"folder": tmp_path, "place": place, "rank": rank}
    run_on_ranks(_fail_on_one_rank, Layout(ranks=2), arguments)


def test_a_refused_tokenizer_ends_an_import_before_anything_is_written(tmp_path: Path) -> None:
    source = toys.make_llama(tmp_path / "source")
    with (
        mock.patch(
            "megatron_fdd.convert.to_mcore.write_companions", side_effect=ValueError("not one; copy it")
        ),
        mock.patch("megatron_fdd.convert.mcore_checkpoint.StreamingSave.save") as written,
        pytest.raises(ValueError, match="^not one; copy it$"),
    ):
        convert.hf_to_mcore(source, tmp_path / "new")
    assert not written.called


def test_where_a_folder_cannot_appear(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with new_folder(tmp_path / "link", "--save") as unfinished:  # as if the target of the link had been given
        (unfinished / "config.json").touch()
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["config.json"]
    with mock.patch("os.path.ismount", return_value=True), pytest.raises(ValueError, match="mount point"):
        check_new_folder(tmp_path / "new", "--save")


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("inline_container.cc: pos")]
)
def test_a_full_disk_is_named_with_its_flag(tmp_path: Path, error: Exception) -> None:
    """torch's writer reports it in its own words, and dist_checkpointing hides the type of both errors."""
    source, new = toys.make_llama(tmp_path / "source"), tmp_path / "new"
    with (
        mock.patch("megatron_fdd.convert.streaming_save._write_item", side_effect=error),
        pytest.raises(ValueError, match=rf"^--save {new}: cannot be written: .*; make room there"),
    ):
        convert.hf_to_mcore(source, new)
    convert.hf_to_mcore(source, tmp_path / "mcore")
    full = mock.patch(
        "megatron_fdd.convert.hf_writer.bytes_of", side_effect=OSError(28, "No space left on device")
    )
    for write in (
        lambda: convert.init_student(source, [0], new),
        lambda: convert.mcore_to_hf(tmp_path / "mcore", new),
    ):
        with (
            full,
            pytest.raises(ValueError, match=rf"^--hf-out {new}: cannot be written: .*; make room there"),
        ):
            write()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mcore", "source"]


@pytest.mark.tier("default")
def test_a_file_that_found_no_room_does_not_crash_the_end(tmp_path: Path) -> None:
    """torch's broken writer would crash when Python collects it."""
    source = toys.make_llama(tmp_path / "source", tokenizer=False)
    words = ["import", "--hf-model", str(source), "--save", str(tmp_path / "new"), "--config-only"]
    script = (
        "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        f"from megatron_fdd.cli import main\nmain({words}, prog_name='fdd')\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: --save {tmp_path}/new: cannot be written: File too large (")
    assert result.returncode == 1
