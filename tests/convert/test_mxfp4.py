"""MXFP4: values as transformers has them, the way back to codes, and the import of a gpt-oss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_fdd import convert
from megatron_fdd.convert.hf_folder import HfFolder
from megatron_fdd.convert.mxfp4 import MicroscaledFp4
from tests.convert import toys
from tests.harness.ranks import distributed

CONFIG = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
NAME = "model.layers.0.mlp.experts.down_proj"


def _random(*shape: int) -> tuple[Tensor, Tensor]:
    """Return blocks [*shape, 16] and scales [*shape]; every code occurs."""
    generator = torch.Generator().manual_seed(3)
    blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
    return blocks, torch.randint(100, 140, shape, generator=generator, dtype=torch.uint8)


def _folder(path: Path, tensors: dict[str, Tensor], settings: dict[str, Any] = CONFIG) -> HfFolder:
    path.mkdir()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    return HfFolder(path)


def _parts(blocks: Tensor, scales: Tensor) -> dict[str, Tensor]:
    return {f"{NAME}_blocks": blocks, f"{NAME}_scales": scales}


@pytest.mark.tier("default")
def test_values_are_those_of_transformers_and_give_their_codes_back(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = _random(3, 6, 2)
    folder = _folder(tmp_path / "model", _parts(blocks, scales))
    value = folder.read(NAME)
    assert folder.names == [NAME]
    assert (folder.shape(NAME), value.dtype) == ((3, 64, 6), torch.bfloat16)
    assert torch.equal(value, convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16))
    quantised = folder.quantised[NAME]
    assert torch.equal(quantised.codes(value, [scales]), blocks)
    assert torch.equal(value.float(), folder.read(NAME, torch.float32))  # bfloat16 rounds nothing
    apart = folder.apart((".down_proj",))
    assert apart.names == [f"{NAME}[{expert}]" for expert in range(3)]
    for expert in range(3):
        assert torch.equal(apart.read(f"{NAME}[{expert}]"), value[expert])


def test_every_scale_and_code(tmp_path: Path) -> None:
    """The largest scale is no number, and the smallest one subnormal in bfloat16."""
    scales = torch.arange(256, dtype=torch.uint8)[:, None]
    blocks = torch.arange(16, dtype=torch.uint8).mul(17).expand(256, 1, 16).contiguous()
    value = _folder(tmp_path / "model", _parts(blocks, scales)).read(NAME, torch.float32).T
    numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    wanted = torch.cat([numbers, -numbers]).repeat_interleave(2) * 2.0 ** (scales.double() - 127)
    assert torch.equal(value[:255], wanted[:255].float())
    assert not value[255].isfinite().any()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda parts: parts.pop(f"{NAME}_scales"), "down_proj_blocks has no .*_scales; copy"),
        (lambda parts: parts.pop(f"{NAME}_blocks"), "down_proj_scales scales nothing"),
        (
            lambda parts: parts.update({NAME: torch.zeros(3, 64, 6)}),
            "down_proj is there twice, by itself and as",
        ),
        (
            lambda parts: parts.update({f"{NAME}_scales": torch.zeros(3, 6, 1, dtype=torch.uint8)}),
            r"\[3, 6, 2, 16\] and _scales U8 \[3, 6, 1\]: MXFP4 has U8, 16 bytes",
        ),
        (lambda parts: parts.update({f"{NAME}_scales": torch.zeros(3, 6, 2)}), "_scales F32"),
    ],
)
def test_parts_that_do_not_fit(change: Any, said: str, tmp_path: Path) -> None:
    parts = _parts(*_random(3, 6, 2))
    change(parts)
    with pytest.raises(ValueError, match=said):
        _ = _folder(tmp_path / "model", parts).names


def test_a_setting_that_is_not_understood() -> None:
    with pytest.raises(ValueError, match=r'"quantization_config.block": 32, which is not understood'):
        MicroscaledFp4().check({**CONFIG, "block": 32})
    with pytest.raises(ValueError, match=r"modules_to_not_convert.*a list, each a text, or null"):
        MicroscaledFp4().check({**CONFIG, "modules_to_not_convert": 5})


@distributed(tp=1)
def test_a_gpt_oss_in_mxfp4(tmp_path: Path) -> None:
    """Its import is that of the bfloat16 model with the same values."""
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    toys.make_llama(plain, "gpt_oss", hidden_size=64, torch_dtype="bfloat16")
    tensors = load_file(plain / "model.safetensors")
    packed.mkdir()
    stored = {}
    for name, value in tensors.items():
        stored[name] = value
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            count, inputs, rows = value.shape
            del stored[name]
            blocks, scales = _random(count, rows, inputs // 32)
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales.clamp(121, 124)}
    save_file(stored, packed / "model.safetensors", {"format": "pt"})
    for path in plain.iterdir():
        if path.suffix != ".safetensors":
            (packed / path.name).write_bytes(path.read_bytes())
    config = toys.read_json(plain / "config.json")
    toys.write_json(packed / "config.json", {**config, "quantization_config": CONFIG})
    read = HfFolder(packed)
    save_file(
        {name: read.read(name).contiguous() for name in read.names},
        plain / "model.safetensors",
        {"format": "pt"},
    )
    for source in (plain, packed):
        convert.hf_to_mcore(source, tmp_path / f"{source.name}-mcore")
        convert.mcore_to_hf(tmp_path / f"{source.name}-mcore", tmp_path / f"{source.name}-back")
    assert toys.tensor_hashes(tmp_path / "packed-back") == toys.tensor_hashes(plain)
    assert toys.tensor_hashes(tmp_path / "plain-back") == toys.tensor_hashes(plain)
    assert "quantization_config" not in toys.read_json(tmp_path / "packed-back" / "config.json")
    convert.mcore_to_hf(tmp_path / "packed-mcore", tmp_path / "codes", quantised=True)
    assert toys.tensor_hashes(tmp_path / "codes") == toys.tensor_hashes(packed)
