"""Files with all experts of a layer in two tensors, as transformers 5 holds them: they mean the published model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_fdd import convert
from megatron_fdd.convert.families import family_of
from megatron_fdd.convert.hf_folder import HfFolder
from tests.convert import toys
from tests.harness.ranks import distributed


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("qwen3_moe_mixed", {}),
        ("mixtral", {}),
        ("glm4_moe", {}),
        ("qwen3_moe", {"hidden_size": 48, "moe_intermediate_size": 24}),  # 2 I = H
        ("qwen3_moe", {"moe_intermediate_size": 48}),  # I = H
    ],
)
@distributed(tp=1)
def test_joined_experts(tmp_path: Path, variant: str, changes: dict[str, int], transposed: bool) -> None:
    source = toys.make_llama(tmp_path / "source", variant, **changes)
    joined = toys.join_experts(source, tmp_path / "joined", transposed=transposed)
    convert.hf_to_mcore(joined, tmp_path / "mcore")
    convert.mcore_to_hf(tmp_path / "mcore", tmp_path / "back")
    assert toys.tensor_hashes(tmp_path / "back") == toys.tensor_hashes(source)


@pytest.mark.tier("default")
def test_published_files_are_taken_as_they_are(tmp_path: Path) -> None:
    folder = HfFolder(toys.make_llama(tmp_path / "source", "qwen3_moe"))
    family = family_of(folder.config)
    assert family.as_stored(folder) is family


def test_a_single_file_beside_shards(tmp_path: Path) -> None:
    toys.write_json(tmp_path / "config.json", {})
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "model-1.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    toys.write_json(index, {"weight_map": {"a": "model-1.safetensors"}})
    with pytest.raises(ValueError, match="model.safetensors, and .*index.json with other files.*left-over"):
        _ = HfFolder(tmp_path).tensors
    toys.write_json(index, {"weight_map": {"a": "model.safetensors"}})
    assert set(HfFolder(tmp_path).tensors) == {"a"}
