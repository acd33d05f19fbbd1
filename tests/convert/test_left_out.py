"""Layers of multi-token prediction: left out by name, or kept beside the checkpoint and put back by an export."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_fdd import convert
from megatron_fdd.cli import hf_to_mcore
from megatron_fdd.cli.mcore_to_hf import told_of
from megatron_fdd.convert.families import family_of
from megatron_fdd.convert.hf_folder import HfFolder
from megatron_fdd.convert.left_out import LeftOutTensors
from megatron_fdd.convert.to_mcore import Imported
from tests.convert import toys
from tests.harness.ranks import distributed

# The toys have three layers.
NAMES = ["model.layers.3.eh_proj.weight", "model.layers.3.enorm.weight"]


def _make(folder: Path, variant: str) -> Path:
    toys.make_llama(folder, variant, num_nextn_predict_layers=1)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {NAMES[0]: torch.randn(48, 96).bfloat16(), NAMES[1]: torch.randn(48).bfloat16()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.tier("default")
@distributed(tp=1)
def test_left_out(tmp_path: Path) -> None:
    source = _make(tmp_path / "hf", "glm4_moe")
    imported = convert.hf_to_mcore(source, tmp_path / "mcore")
    assert (list(imported.left_out), imported.left_out_are) == (NAMES, "multi-token prediction")
    convert.mcore_to_hf(tmp_path / "mcore", tmp_path / "back")
    wanted = {name: sums for name, sums in toys.tensor_hashes(source).items() if name not in NAMES}
    assert toys.tensor_hashes(tmp_path / "back") == wanted
    config = toys.read_json(source / "config.json")
    assert toys.read_json(tmp_path / "back" / "config.json") == {**config, "num_nextn_predict_layers": 0}


@pytest.mark.tier("default")
@distributed(tp=1)
def test_kept(tmp_path: Path) -> None:
    source = _make(tmp_path / "hf", "deepseek_v3")
    convert.hf_to_mcore(source, tmp_path / "mcore", keep_left_out=True)
    exported = convert.mcore_to_hf(tmp_path / "mcore", tmp_path / "back")
    assert toys.tensor_hashes(tmp_path / "back") == toys.tensor_hashes(source)
    assert exported.num_tensors == len(toys.tensor_hashes(source))
    assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    kept = LeftOutTensors(tmp_path / "mcore" / "left-out")
    config = toys.read_json(source / "config.json")
    assert kept.fit(family_of(config), config)
    assert not kept.fit(family_of(config), {**config, "num_hidden_layers": 2})


@pytest.mark.tier("default")
@distributed(tp=1)
def test_a_student_and_another_vocabulary_have_none(tmp_path: Path) -> None:
    source = _make(tmp_path / "hf", "deepseek_v3")
    assert convert.StudentPlan.of(source, [0, 2], {}).left_out == NAMES
    convert.init_student(source, [0, 2], tmp_path / "student")
    student = HfFolder(tmp_path / "student")
    assert not any(name.startswith("model.layers.2") for name in student.names)
    assert student.config["num_nextn_predict_layers"] == 0


@pytest.mark.tier("default")
@distributed(tp=1)
def test_a_type_that_transformers_has_by_another_name(tmp_path: Path) -> None:
    source = _make(tmp_path / "hf", "deepseek_v3")
    config = toys.read_json(source / "config.json") | {"model_type": "kimi_k2"}
    (source / "config.json").write_text(json.dumps(config))
    convert.hf_to_mcore(source, tmp_path / "mcore")
    exported = convert.mcore_to_hf(tmp_path / "mcore", tmp_path / "back")
    assert exported.loads_as == "deepseek_v3"
    told = told_of(Path("mcore"), Path("back"), exported)
    assert 'which transformers loads once config.json has "model_type": "deepseek_v3"' in told
    again = told_of(Path("mcore"), Path("back"), dataclasses.replace(exported, loads_as=""))
    assert "tensors of mcore, ready for from_pretrained" in again


@pytest.mark.parametrize(
    ("fields", "names", "expected"),
    [
        ({"num_nextn_predict_layers": 1}, ["model.layers.3.a", "model.layers.4.a"], ["model.layers.3.a"]),
        ({"num_mtp_layers": 2}, ["model.layers.30.a", "model.layers.4.a"], ["model.layers.4.a"]),
        ({"num_nextn_predict_layers": 0}, ["model.layers.3.a"], []),
        ({"num_nextn_predict_layers": None}, ["model.layers.3.a"], []),
    ],
)
def test_which_layers_are_left_out(fields: dict[str, int], names: list[str], expected: list[str]) -> None:
    config = toys.llama_config("glm4_moe", **fields)
    assert family_of(config).left_out_names(config, names) == expected


def test_other_families_leave_nothing_out() -> None:
    config = toys.llama_config("plain")
    assert family_of(config).left_out_names(config, ["model.layers.3.a"]) == []


def test_prediction_layers_begin_behind_a_number_that_the_config_must_have() -> None:
    config = {"model_type": "deepseek_v3"}
    with pytest.raises(
        ValueError, match='lacks "num_hidden_layers", which says where such layers begin; add it'
    ):
        family_of(config).left_out_names(config, [])


@pytest.mark.parametrize(
    ("left_out", "keep_mtp", "told"),
    [
        ((), False, []),
        ((), True, ["--keep-mtp kept nothing: {} has no layers of multi-token prediction"]),
        (("a", "b"), False, ["2 tensors of multi-token prediction (a ...) are left out"]),
        (("a", "b"), True, ["2 tensors of multi-token prediction (a ...) are kept beside the checkpoint"]),
    ],
)
def test_an_import_says_what_it_did_not_take(
    tmp_path: Path, left_out: tuple[str, ...], keep_mtp: bool, told: list[str]
) -> None:
    imported = Imported(5, left_out, "multi-token prediction", keep_mtp)
    lines = hf_to_mcore.told_of(imported, tmp_path, tmp_path / "saved", keep_mtp=keep_mtp).splitlines()
    assert lines[: len(told)] == [line.format(tmp_path) for line in told]
    [no_tokenizer] = lines[len(told) : -1]
    assert no_tokenizer.startswith(
        f"{tmp_path} has no tokenizer: give one to fdd prepare (--tokenizer-model)"
    )
    (tmp_path / "tokenizer.json").touch()
    assert (
        len(hf_to_mcore.told_of(imported, tmp_path, tmp_path, keep_mtp=keep_mtp).splitlines())
        == len(told) + 1
    )
