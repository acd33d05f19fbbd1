"""The engine `vllm`: norm and head out of a teacher's files, without its layers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from benchmarks.tiny_teachers import VOCABULARY, tiny_model
from megatron_fdd.teach.hf_parts import Parts, find_parts
from megatron_fdd.teach.vllm.lens_model import find_lens
from megatron_fdd.teach.vllm.teacher import sampled_digest


def found_in(folder: Path) -> tuple[Parts, int]:
    return find_lens(folder, AutoConfig.from_pretrained(folder), "float32")


SLOW = pytest.mark.tier("default")
# Each stands for a kind: of norm, constant, bias, cap, layer, or mixture of experts.
KINDS = "llama gpt2 cohere granite gemma olmo falcon_h1 mamba deepseek_v3 gpt_oss gemma2 phi".split()


@pytest.mark.parametrize(
    "model_type", [each if each in ("llama", "gemma2") else pytest.param(each, marks=SLOW) for each in KINDS]
)
def test_the_lens_is_that_of_the_whole_model(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path)
    wanted, (found, num_ids) = find_parts(model), found_in(tmp_path)
    assert num_ids == VOCABULARY
    assert (found.norm_name, found.weight_name, found.head_name) == (
        wanted.norm_name,
        wanted.weight_name,
        wanted.head_name,
    )
    assert (found.norm.kind, found.norm.epsilon, found.cap) == (
        wanted.norm.kind,
        wanted.norm.epsilon,
        wanted.cap,
    )
    assert found.constant == pytest.approx(wanted.constant, rel=1e-5)
    assert torch.equal(found.norm.weight_T, wanted.norm.weight_T)
    assert torch.equal(found.head_VT, wanted.head_VT)
    for one, other in (
        (found.norm.bias_T, wanted.norm.bias_T),
        (found.extras.bias_V, wanted.extras.bias_V),
    ):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a model in several files, the layers in those of their own."""
    path = tmp_path_factory.mktemp("hf") / "llama"
    tiny_model("llama").save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    weight_map = {name: "layers" if ".layers." in name else "outside" for name in tensors}
    for file in ("layers", "outside"):
        own = {name: tensors[name] for name in tensors if weight_map[name] == file}
        save_file(own, path / f"{file}.safetensors", {"format": "pt"})
    weight_map = {name: f"{file}.safetensors" for name, file in weight_map.items()}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def test_layers_are_not_read(folder: Path, tmp_path: Path) -> None:
    """In their file are numbers in 8 bits here, as in a quantised teacher, by a method whose package is not there."""
    path = shutil.copytree(folder, tmp_path / "packed")
    layers = load_file(path / "layers.safetensors")
    packed = {name: torch.zeros_like(each, dtype=torch.float8_e4m3fn) for name, each in layers.items()}
    save_file(packed, path / "layers.safetensors", {"format": "pt"})
    config: dict[str, Any] = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (path / "config.json").write_text(json.dumps(config))
    found, _ = found_in(path)
    assert torch.equal(found.head_VT, tiny_model("llama").lm_head.weight)


def test_a_folder_without_a_norm_is_refused(folder: Path, tmp_path: Path) -> None:
    path = shutil.copytree(folder, tmp_path / "lacking")
    outside = load_file(path / "outside.safetensors")
    outside["model.norm.other"] = outside.pop("model.norm.weight")
    save_file(outside, path / "outside.safetensors", {"format": "pt"})
    index = json.loads((path / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.norm.weight"]
    index["weight_map"]["model.norm.other"] = "outside.safetensors"
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"its files have no model\.norm\.weight, or in another shape; copy"):
        found_in(path)


def test_a_model_without_a_lens_is_refused(tmp_path: Path) -> None:
    tiny_model("modernbert-decoder").save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"not found in a small model of the type modernbert-decoder \(--tea"
    ):
        found_in(tmp_path)


def test_other_weights_are_another_teacher(folder: Path, tmp_path: Path) -> None:
    path = shutil.copytree(folder, tmp_path / "other")
    assert sampled_digest(path) == sampled_digest(folder)
    layers = load_file(path / "layers.safetensors")
    layers["model.layers.2.mlp.up_proj.weight"] *= 1.01
    save_file(layers, path / "layers.safetensors", {"format": "pt"})
    assert sampled_digest(path) != sampled_digest(folder)
