"""FP8 in blocks: values as transformers has them, cut blocks, the way back to codes, and a folder's import."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_fdd import convert
from megatron_fdd.convert.fp8 import BlockFp8
from megatron_fdd.convert.hf_folder import HfFolder
from tests.convert import toys
from tests.harness.ranks import distributed

# Blocks of the toys, whose matrices are smaller than a real block; no width but 48 is a multiple of 16.
BLOCK = [16, 16]
CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": BLOCK}


def quantise(value_RC: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes and scales of a matrix, one block after the other."""
    rows, columns = [-(-size // part) for size, part in zip(value_RC.shape, BLOCK, strict=True)]
    codes = torch.empty(value_RC.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(rows, columns)
    for row in range(rows):
        for column in range(columns):
            block = (slice(16 * row, 16 * row + 16), slice(16 * column, 16 * column + 16))
            scales[row, column] = value_RC[block].float().abs().max() / 448
            codes[block] = (value_RC[block].float() / scales[row, column]).to(torch.float8_e4m3fn)
    return codes, scales


def make_fp8(folder: Path, variant: str, **changes: Any) -> Path:
    """Make a model folder whose matrices in layers are in FP8, with a layer that predicts further tokens."""
    toys.make_llama(folder, variant, **changes)
    tensors = load_file(folder / "model.safetensors")
    if changes:
        tensors["model.layers.3.eh_proj.weight"] = torch.randn(48, 96)
    for name, value in list(tensors.items()):
        if value.ndim == 2 and ".layers." in name and not name.endswith("gate.weight"):
            tensors[name], tensors[f"{name}_scale_inv"] = quantise(value)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = toys.read_json(folder / "config.json")
    toys.write_json(folder / "config.json", {**config, "quantization_config": CONFIG})
    return folder


def _write(folder: Path, tensors: dict[str, Tensor], settings: dict[str, Any] = CONFIG) -> HfFolder:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings}))
    return HfFolder(folder)


@pytest.mark.tier("default")
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu, torch.uint8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_are_those_of_transformers(
    tmp_path: Path, scale_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    codes, scales = quantise(torch.randn(48, 32))
    if scale_dtype is torch.uint8:
        scales = scales.to(torch.float8_e8m0fnu).view(torch.uint8)
    scales = scales.to(scale_dtype)
    folder = _write(tmp_path / "hf", {"w": codes, "w_scale_inv": scales})
    wanted = Fp8Dequantize(None)._dequantize_one(codes, scales, output_dtype=dtype)
    assert torch.equal(folder.read("w", dtype), wanted)
    assert (folder.names, folder.dtype("w"), folder.shape("w")) == (["w"], torch.bfloat16, (48, 32))


def test_every_code_has_torchs_value(tmp_path: Path) -> None:
    """Subnormal numbers, both zeros and what is no number among them"""
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16).view(torch.float8_e4m3fn)
    folder = _write(tmp_path / "hf", {"w": codes, "w_scale_inv": torch.ones(1, 1)})
    found, wanted = folder.read("w", torch.float32), codes.float()
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found.nan_to_num().view(torch.int32), wanted.nan_to_num().view(torch.int32))


@pytest.mark.parametrize(("rows", "columns"), [(300, 10_000), (2, 1_100_000)])
def test_large_matrices_are_read_in_parts(tmp_path: Path, rows: int, columns: int) -> None:
    """Some rows of a block of 128 at a time, one at least."""
    generator = torch.Generator().manual_seed(4)
    codes = torch.randint(0, 0x7F, (rows, columns), dtype=torch.uint8, generator=generator)
    codes = codes.view(torch.float8_e4m3fn)
    scales = torch.rand(-(-rows // 128), -(-columns // 128), generator=generator)
    settings = {**CONFIG, "weight_block_size": [128, 128]}
    folder = _write(tmp_path / "hf", {"w": codes, "w_scale_inv": scales}, settings)
    each = scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    value = folder.read("w")
    assert torch.equal(value, (codes.float() * each).bfloat16())
    back = folder.quantised["w"].codes(value, [scales])
    assert torch.equal(folder.quantised["w"].value([back, scales], torch.bfloat16), value)


def test_blocks_that_are_cut_short_and_the_way_back(tmp_path: Path) -> None:
    """transformers refuses 40 rows of 3 scales, as DeepSeek-V3 has 576 of 5; the codes come back from bf16."""
    codes, scales = quantise(torch.randn(40, 23) * torch.logspace(-4, 4, 40)[:, None])
    folder = _write(tmp_path / "hf", {"w": codes, "w_scale_inv": scales})
    value, quantised = folder.read("w"), folder.quantised["w"]
    others = [folder.raw(name) for name in quantised.parts[1:]]
    each = scales.repeat_interleave(16, 0)[:40].repeat_interleave(16, 1)[:, :23]
    assert torch.equal(value, (codes.double() * each.double()).float().bfloat16())
    for dtype in (torch.bfloat16, torch.float32):
        value = folder.read("w", dtype)
        before = value.clone()
        back = quantised.codes(value, others)
        assert torch.equal(back.view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(value, before)


SCALE = torch.ones(1, 1)
CODES = torch.ones(16, 16).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"w": CODES}, "w is stored in FP8 and has no w_scale_inv"),
        ({"w_scale_inv": SCALE}, "w_scale_inv scales nothing"),
        ({"w": torch.ones(16, 16), "w_scale_inv": SCALE}, "w is stored as F32 and has w_scale_inv"),
        ({"w": CODES, "w_scale_inv": torch.ones(2, 1)}, r"shape \[2, 1\].* need \[1, 1\]"),
        ({"w": CODES, "w_scale_inv": torch.ones(1, 1, dtype=torch.int32)}, "w_scale_inv is stored as I32"),
    ],
)
def test_parts_that_do_not_fit(tmp_path: Path, tensors: dict[str, Tensor], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        _ = _write(tmp_path / "hf", tensors).names


@pytest.mark.parametrize("scale", [0.0, 1e-45, 2.0**-118, -1.0, 2.0**118, float("inf"), float("nan")])
def test_scales_that_would_lose_their_codes(tmp_path: Path, scale: float) -> None:
    codes = torch.cat((torch.zeros(16, 16), torch.ones(3, 16))).to(torch.float8_e4m3fn)
    folder = _write(tmp_path / "hf", {"w": codes, "w_scale_inv": torch.tensor([[1.0], [scale]])})
    said = re.escape(f"w_scale_inv has {torch.tensor(scale):g} for block (1, 0): a scale must lie between")
    with pytest.raises(ValueError, match=said):
        folder.read("w")


@pytest.mark.parametrize("scale", [0.0, 1e-45])
def test_a_block_of_nothing_but_zeros_may_have_no_scale(tmp_path: Path, scale: float) -> None:
    codes = torch.tensor([[0.0, -0.0], [-0.0, 0.0]]).repeat(8, 8).to(torch.float8_e4m3fn)
    scales = torch.tensor([[scale]])
    folder = _write(tmp_path / "hf", {"w": codes, "w_scale_inv": scales})
    value = folder.read("w")
    assert not value.any()
    back = folder.quantised["w"].codes(value, [scales])
    assert torch.equal(back.view(torch.uint8), codes.view(torch.uint8))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quant_method": "gptq"}, "gptq.*not read here.*fdd teach"),
        ({"bits": 4}, "quantization_config.*not read here"),
        ({**CONFIG, "fmt": "e5m2"}, "fmt.*e4m3"),
        ({**CONFIG, "activation_scheme": "static"}, "activation_scheme"),
        ({**CONFIG, "weight_block_size": [128]}, "weight_block_size.*two whole numbers"),
        ({**CONFIG, "weight_block_size": "x"}, "weight_block_size.*a list, each a whole number"),
        ({**CONFIG, "modules_to_not_convert": 5}, "modules_to_not_convert.*a list, each a text, or null"),
        ({**CONFIG, "kv_cache_scheme": "fp8"}, "kv_cache_scheme.*not understood"),
    ],
)
def test_settings_refused_by_name(tmp_path: Path, settings: dict[str, Any], named: str) -> None:
    folder = _write(tmp_path / "hf", {"w": CODES, "w_scale_inv": SCALE}, settings)
    with pytest.raises(ValueError, match=named):
        _ = folder.config


def test_no_settings_change_nothing() -> None:
    BlockFp8().check({"quant_method": "fp8"})


@pytest.mark.parametrize("variant", ["qwen3", "deepseek_v3"])
@pytest.mark.tier("default")
@distributed(tp=1)
def test_a_folder_becomes_bf16(tmp_path: Path, variant: str) -> None:
    """It is the same as the import and export of a folder with the values."""
    source = make_fp8(tmp_path / "hf", variant)
    folder = HfFolder(source)
    convert.hf_to_mcore(source, tmp_path / "mcore", dtype="bfloat16")
    exported = convert.mcore_to_hf(tmp_path / "mcore", tmp_path / "back")
    back = HfFolder(tmp_path / "back")
    assert sorted(back.names) == sorted(folder.names)
    assert exported.num_tensors == len(folder.names)
    for name in folder.names:
        wanted = folder.read(name)
        if not name.endswith("e_score_correction_bias"):
            wanted = wanted.bfloat16()
        assert torch.equal(back.read(name), wanted), name
    assert "quantization_config" not in back.stored_config


@pytest.mark.tier("default")
@distributed(tp=1)
def test_the_way_back_to_fp8(tmp_path: Path) -> None:
    """Codes, scales and config.json come back byte for byte, also those of layers that no table has."""
    source = make_fp8(tmp_path / "hf", "deepseek_v3", num_nextn_predict_layers=1)
    convert.hf_to_mcore(source, tmp_path / "mcore", keep_left_out=True)
    exported = convert.mcore_to_hf(tmp_path / "mcore", tmp_path / "back", quantised=True)
    assert toys.tensor_hashes(tmp_path / "back") == toys.tensor_hashes(source)
    assert (exported.num_tensors, exported.unchanged) == (len(toys.tensor_hashes(source)), None)
    assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    # An export has checksums of what is stored, which an import verifies.
    convert.hf_to_mcore(tmp_path / "back", tmp_path / "again")
    with pytest.raises(ValueError, match="--quantised.*leave out --dtype"):
        convert.mcore_to_hf(tmp_path / "mcore", tmp_path / "no", quantised=True, dtype="float32")
    _change_scales(tmp_path / "mcore" / "quantised" / "model.safetensors")
    with pytest.raises(ValueError, match="--quantised: model.layers.* is not what was imported"):
        convert.mcore_to_hf(tmp_path / "mcore", tmp_path / "no", quantised=True)
    (tmp_path / "mcore" / "release").rename(tmp_path / "mcore" / "iter_0000001")
    (tmp_path / "mcore" / "latest_checkpointed_iteration.txt").write_text("1")
    with pytest.raises(ValueError, match="--quantised: a training has changed"):
        convert.mcore_to_hf(tmp_path / "mcore", tmp_path / "no", quantised=True)
    (tmp_path / "mcore" / "iter_0000001").rename(tmp_path / "mcore" / "release")
    (tmp_path / "mcore" / "latest_checkpointed_iteration.txt").write_text("release")
    shutil.rmtree(tmp_path / "mcore" / "quantised")
    with pytest.raises(ValueError, match="--quantised: no scales lie beside"):
        convert.mcore_to_hf(tmp_path / "mcore", tmp_path / "no", quantised=True)


@pytest.mark.tier("default")
@distributed(tp=1)
def test_the_way_back_from_other_dtypes(tmp_path: Path) -> None:
    """float32 has all codes; float16 rounds small values to 0."""
    source = make_fp8(tmp_path / "hf", "qwen3")
    for dtype in ("float32", "float16"):
        convert.hf_to_mcore(source, tmp_path / dtype, dtype=dtype)
    convert.mcore_to_hf(tmp_path / "float32", tmp_path / "back", quantised=True)
    before, after = HfFolder(source), HfFolder(tmp_path / "back")
    for name in before.quantised:
        assert torch.equal(before.raw(name).view(torch.uint8), after.raw(name).view(torch.uint8)), name
    with pytest.raises(ValueError, match="--quantised: .* float16, which rounds .* import the folder again"):
        convert.mcore_to_hf(tmp_path / "float16", tmp_path / "no", quantised=True)


def _change_scales(path: Path) -> None:
    save_file({name: scale * 1.1 for name, scale in load_file(path).items()}, path, {"format": "pt"})
