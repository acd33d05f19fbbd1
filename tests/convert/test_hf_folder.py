"""Lazy reading of sharded folders, writing of shards, and folders that appear only when they are complete."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

from megatron_fdd import convert
from megatron_fdd.convert.checksums import digest
from megatron_fdd.convert.config_class import check_config_class
from megatron_fdd.convert.hf_companions import carry_companions, link_left_out
from megatron_fdd.convert.hf_folder import INDEX_FILE, HfFolder, copy_files
from megatron_fdd.convert.hf_writer import (
    TensorSpec,
    new_folder,
    parse_size,
    plan_shards,
    write_index,
    write_shard,
)
from tests.convert import toys

TENSORS = {name: torch.randn(6, 4) for name in ("a", "b", "c", "d")}


def _write(folder: Path, max_bytes: int) -> Path:
    folder.mkdir()
    toys.write_json(folder / "config.json", {})
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()]
    shards = plan_shards(specs, max_bytes)
    for shard in shards:
        written = list(write_shard(folder, shard, [TENSORS[spec.name] for spec in shard.tensors]))
        assert [(spec, digest(TENSORS[spec.name])) for spec in shard.tensors] == written
    write_index(folder, shards)
    return folder


def test_a_tensor_is_hashed_while_the_next_is_written(tmp_path: Path) -> None:
    """What a thread finds is told."""
    (shard,) = plan_shards([TensorSpec(name, torch.float32, (6, 4)) for name in TENSORS], 10**6)
    asked = []

    def values() -> Iterator[torch.Tensor]:
        for name, value in TENSORS.items():
            asked.append(name)
            yield value

    told = write_shard(tmp_path, shard, values())
    assert next(told)[0].name == "a"
    assert asked == ["a", "b"]
    assert [spec.name for spec, _ in told] == ["b", "c", "d"]
    spoilt = [TENSORS["a"], torch.full((6, 4), torch.inf), TENSORS["c"], TENSORS["d"]]
    list(write_shard(tmp_path, shard, spoilt))
    with pytest.raises(ValueError, match="b: 24 of 24 values are not finite .*; train again"):
        list(write_shard(tmp_path, shard, spoilt, "train again"))


def test_slices_of_one_tensor(tmp_path: Path) -> None:
    """Experts are written one after the other, as one tensor in one file, and read one by one."""
    experts = torch.randn(3, 6, 4)
    names = ["a", "e.w[0]", "e.w[1]", "e.w[2]", "b"]
    values = [TENSORS["a"], *experts, TENSORS["b"]]
    specs = [TensorSpec(name, v.dtype, tuple(v.shape)) for name, v in zip(names, values, strict=True)]
    shards = plan_shards(specs, 100)
    assert [len(shard.tensors) for shard in shards] == [1, 3, 1]
    (tmp_path / "out").mkdir()
    toys.write_json(tmp_path / "out" / "config.json", {})
    by_name = dict(zip(names, values, strict=True))
    for shard in shards:
        list(write_shard(tmp_path / "out", shard, [by_name[spec.name] for spec in shard.tensors]))
    write_index(tmp_path / "out", shards)
    source = HfFolder(tmp_path / "out")
    assert set(source.tensors) == {"a", "b", "e.w"}
    assert torch.equal(source.read("e.w"), experts)
    apart = source.apart((".w",))
    assert set(apart.tensors) == set(names)
    for name, value in by_name.items():
        assert torch.equal(apart.read(name), value)


def test_a_file_that_becomes_shorter(tmp_path: Path) -> None:
    folder = HfFolder(toys.make_llama(tmp_path / "hf", tokenizer=False))
    assert folder.names
    os.truncate(tmp_path / "hf" / "model.safetensors", 20_000)
    with pytest.raises(
        ValueError, match=r"model.safetensors has become shorter .* model.norm.weight .* copy the"
    ):
        folder.read("model.norm.weight")


@pytest.mark.parametrize(("max_bytes", "files"), [(96, 4), (200, 2), (10, 4), (10_000, 1)])
def test_shards_and_index(tmp_path: Path, max_bytes: int, files: int) -> None:
    folder = _write(tmp_path / "out", max_bytes)
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if files == 1:
        assert names == ["model.safetensors"]
        assert not (folder / INDEX_FILE).exists()
    else:
        assert names == [f"model-{i + 1:05d}-of-{files:05d}.safetensors" for i in range(files)]
        index = json.loads((folder / INDEX_FILE).read_text())
        assert index["metadata"]["total_size"] == 4 * 96
        assert set(index["weight_map"].values()) == set(names)
    source = HfFolder(folder)
    for name, tensor in TENSORS.items():
        assert torch.equal(source.read(name), tensor)
        assert source.shape(name) == (6, 4)


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("40KB", 40_000), ("7", 7), ("7B", 7)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5PB", "five"])
def test_sizes_refused(text: str) -> None:
    with pytest.raises(ValueError, match="5GB"):
        parse_size(text)


def test_a_missing_a_truncated_and_a_disagreeing_shard(tmp_path: Path) -> None:
    folder = _write(tmp_path / "out", 200)
    first, second = sorted(folder.glob("*.safetensors"))
    whole = second.read_bytes()
    second.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=rf"{second.name} is damaged"):
        _ = HfFolder(folder).tensors
    second.unlink()
    with pytest.raises(ValueError, match=rf"{second.name} does not exist"):
        _ = HfFolder(folder).tensors
    save_file({"c": TENSORS["c"], "e": TENSORS["d"]}, second)
    with pytest.raises(ValueError, match="disagree about: d, e"):
        _ = HfFolder(folder).tensors
    second.write_bytes(whole)
    assert len(HfFolder(folder).tensors) == 4


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a folder"):
        HfFolder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="the folder has no config.json; give"):
        HfFolder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        HfFolder(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="a JSON object, not a list"):
        HfFolder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="safe_serialization"):
        _ = HfFolder(tmp_path).tensors


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a":', "is not valid JSON"),
        ("[]", "must hold a JSON object"),
        ('{"eos_token_id": "two"}', r"has \"eos_token_id\": 'two', which must be a whole number.*correct it"),
        ('{"eos_token_id": [1, true]}', r"has \"eos_token_id\": \[1, True\], which"),
    ],
)
def test_a_generation_config_that_an_export_could_not_read(tmp_path: Path, text: str, said: str) -> None:
    folder = _write(tmp_path / "source", 10**6)
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=f"generation_config.json {said}"):
        HfFolder(folder)


def test_new_folder_appears_when_complete_and_never_half(tmp_path: Path) -> None:
    final = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), new_folder(final, "--hf-out") as unfinished:  # noqa: PT012
        (unfinished / "config.json").write_text("{}")
        assert not final.exists()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".out.incomplete").mkdir()  # as a killed process leaves it
    (tmp_path / ".out.incomplete" / "stale").touch()
    final.mkdir()
    with new_folder(final, "--hf-out") as unfinished:
        (unfinished / "config.json").write_text("{}")
    assert [path.name for path in final.iterdir()] == ["config.json"]
    assert list(tmp_path.iterdir()) == [final]
    with (
        pytest.raises(ValueError, match=rf"^--hf-out {final}: exists already and is not empty"),
        new_folder(final, "--hf-out"),
    ):
        pass


def test_what_another_process_is_writing_stays(tmp_path: Path) -> None:
    final = tmp_path / "out"
    with new_folder(final, "--hf-out") as unfinished:
        (unfinished / "config.json").write_text("{}")
        with pytest.raises(ValueError, match="another process is writing it"), new_folder(final, "--hf-out"):
            pass
    assert [path.name for path in final.iterdir()] == ["config.json"]


def test_companions_that_were_copied_in_part_are_copied_again(tmp_path: Path) -> None:
    load, save = tmp_path / "load", tmp_path / "save"
    (load / "tokenizer").mkdir(parents=True)
    (load / "tokenizer" / "tokenizer.json").write_text("whole")
    save.mkdir()
    with (
        mock.patch("shutil.copyfile", lambda _, target: (target.with_name("half").touch(), 1 / 0)),
        pytest.raises(ZeroDivisionError),  # for a signal
    ):
        carry_companions(load, save)
    assert not any(save.iterdir())
    os.mkfifo(save / ".tokenizer.incomplete")  # nor does it wait for a pipe
    for name, mtime in ((".tokenizer.0.incomplete", 1), (".tokenizer.1.incomplete", time.time())):
        (save / name).mkdir()  # of a killed run
        os.utime(save / name, (mtime, mtime))
    (save / "tokenizer").mkdir()  # nobody puts a whole one there
    carry_companions(load, save)
    names = {path.name for path in save.iterdir()}
    assert names == {"tokenizer", ".tokenizer.1.incomplete", ".tokenizer.incomplete"}
    assert [path.name for path in (save / "tokenizer").iterdir()] == ["tokenizer.json"]


def test_companions_are_copied_by_several_at_once(tmp_path: Path) -> None:
    load = tmp_path / "load"
    for name in ("hf", "tokenizer"):
        (load / name).mkdir(parents=True)
        for number in range(5):
            (load / name / f"{number}.json").write_text("whole")
    for number in range(30):
        save = tmp_path / str(number)
        save.mkdir()
        with ThreadPoolExecutor(4) as threads:
            for each in [threads.submit(carry_companions, load, save) for _ in range(4)]:
                each.result()
        assert sorted(path.name for path in save.iterdir()) == ["hf", "tokenizer"]
        assert [len(list(path.iterdir())) for path in save.iterdir()] == [5, 5]


def test_what_an_import_kept_is_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, save, other = (tmp_path / name for name in ("load", "save", "other"))
    for folder in (load / "left-out", save, other):
        folder.mkdir(parents=True)
    (load / "left-out" / "a.safetensors").write_bytes(b"images")
    link_left_out(load, save)
    assert (save / "left-out" / "a.safetensors").samefile(load / "left-out" / "a.safetensors")
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links here")))
    link_left_out(load, other)  # an export looks beside `load`
    assert not any(other.iterdir())


def _change_weights(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    source = HfFolder(folder)
    tensors = {name: source.read(name) for name in source.tensors}
    tensors = {name: value for name, value in {**tensors, **change}.items() if value is not None}
    save_file(tensors, folder / "model.safetensors")


def test_one_file_comes_before_an_index(tmp_path: Path) -> None:
    """The folder is like one of transformers, whose save_pretrained removes old shards and leaves their index."""
    folder = _write(tmp_path / "out", 96)
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    save_file({"z": torch.ones(2)}, folder / "model.safetensors")
    assert list(HfFolder(folder).tensors) == ["z"]


MISSING = "model.layers.1.self_attn.v_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({MISSING: None}, rf"Missing: {MISSING}. Not used: nothing"),
        ({"model.layers.3.mlp.up_proj.weight": torch.ones(2)}, "Not used: model.layers.3.mlp.up_proj.weight"),
        ({"model.layers.0.self_attn.q_proj.bias": torch.ones(2)}, "Not used: .*q_proj.bias"),
        ({"lm_head.weight": None}, "Missing: lm_head.weight"),
        ({"model.norm.weight": torch.ones(48, dtype=torch.float16)}, "mixes dtypes .*--dtype"),
        ({"model.norm.weight": torch.ones(48, dtype=torch.int8)}, "stored as I8"),
        ({"model.norm.weight": torch.ones(47)}, r"of shape \[47\] does not fit config.json, .* \[48\]"),
    ],
)
def test_weights_that_do_not_match_the_config(tmp_path: Path, change: dict, message: str) -> None:
    folder = toys.make_llama(tmp_path / "hf", tokenizer=False)
    _change_weights(folder, change)
    with pytest.raises(ValueError, match=message):
        convert.hf_to_mcore(folder, tmp_path / "mcore")
    assert not (tmp_path / "mcore").exists()
    # A GPTModel leaves these variables behind, and they would stop a run that this process starts.
    assert not [name for name in os.environ if name.startswith("NVTE_")]


def test_integers_are_refused_whatever_dtype_is_asked_for(tmp_path: Path) -> None:
    folder = toys.make_llama(tmp_path / "hf", tokenizer=False)
    _change_weights(folder, {"model.norm.weight": torch.ones(48, dtype=torch.int8)})
    with pytest.raises(ValueError, match="stored as I8"):
        convert.hf_to_mcore(folder, tmp_path / "mcore", dtype="float32")


def test_a_repeated_tied_head_and_rope_buffers_are_no_extra_weights(tmp_path: Path) -> None:
    from megatron_fdd.convert.families import family_of
    from megatron_fdd.convert.hf_source import check_names

    folder = toys.make_llama(tmp_path / "hf", "tied", tokenizer=False)
    embedding = HfFolder(folder).read("model.embed_tokens.weight")
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5)}
    _change_weights(folder, {"lm_head.weight": embedding.clone(), **buffer})
    source = HfFolder(folder)
    check_names(family_of(source.config), source)
    assert source.common_dtype(source.tensors) == torch.float32
    _change_weights(folder, {"lm_head.weight": embedding + 1})
    source = HfFolder(folder)
    with pytest.raises(ValueError, match="ties the embeddings, but lm_head.weight"):
        check_names(family_of(source.config), source)


def test_what_is_no_file_is_not_left_out_of_a_copy(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").symlink_to("gone")
    with pytest.raises(ValueError, match=f"^{tmp_path / 'b'} is no file"):
        copy_files(["a", "b", "c"], tmp_path, tmp_path / "copy")
    (tmp_path / "b").unlink()
    assert copy_files(["a", "b", "c"], tmp_path, tmp_path / "copy") == ["a"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"use_cache": float("nan")}, "field 'use_cache'.*expected bool"),
        (
            {"model_type": "qwen3_moe", "router_aux_loss_coef": "x"},
            "field 'router_aux_loss_coef'.*expected float",
        ),
    ],
)
def test_a_config_that_transformers_could_not_load(fields: dict[str, Any], said: str) -> None:
    config = {"model_type": "llama", "hidden_size": 48, "num_attention_heads": 12}
    check_config_class(config)
    check_config_class({**fields, "model_type": "nobodys"})
    with pytest.raises(ValueError, match=f"config.json must be one that transformers can load.*{said}"):
        check_config_class({**config, **fields})
