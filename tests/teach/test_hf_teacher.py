"""A teacher in a Hugging Face folder: what is loaded of it, its identity, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.tiny_teachers import LAYERS, tiny_model
from megatron_fdd.data.store.identity import StoreIdentity, TapForm
from megatron_fdd.teach.hf_parts import find_parts
from megatron_fdd.teach.hf_teacher import UNKNOWN, HfTeacher
from megatron_fdd.teach.transformers import TransformersEngine
from tests.teach.engines import (
    BLOCKS,
    engine_of,
    units,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf") / "llama"
    tiny_model("llama").save_pretrained(path)
    return path


def changed(folder: Path, target: Path, **fields: Any) -> Path:
    """Copy a model's folder, with other fields in its config.json."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **fields}))
    return target


def teacher_in(folder: Path, dtype: str = "float32", device_map: Any = "cpu") -> HfTeacher:
    return HfTeacher(folder, dtype, device_map)


def test_a_folder_gives_the_same_states_from_disk(folder: Path, tmp_path: Path) -> None:
    """A part that is on disk between two forward passes has no weights to look at."""
    places = dict.fromkeys(
        ("model.embed_tokens", "model.rotary_emb", *map("model.layers.{}".format, (0, 2, 3))), "cpu"
    )
    places |= dict.fromkeys(("model.layers.1", "model.norm", "lm_head"), "disk")
    found = []
    for number, device_map in enumerate(("cpu", places)):
        teacher = teacher_in(folder, device_map=device_map)
        teacher.check("float32")
        model = teacher.load(tmp_path / str(number))
        assert (model.lm_head.weight.device.type == "meta") == (device_map is places)
        parts = find_parts(model)
        identity = teacher.identity(model, parts, teacher.outline(BLOCKS, "float32"))
        engine = TransformersEngine(identity, model, parts)
        found.append((engine.identity, engine.lens(units()), engine.states(units())))
    (identity, lens, states), (other_identity, other_lens, other_states) = found
    assert identity == other_identity
    assert torch.equal(lens.head_VT, other_lens.head_VT)
    assert torch.equal(lens.norm.weight_T, other_lens.norm.weight_T)
    assert all(np.array_equal(one, other) for one, other in zip(states, other_states, strict=True))
    model = tiny_model("llama")
    assert np.array_equal(engine_of(model, find_parts(model)).states(units())[0], states[0])


def identity_in(folder: Path, dtype: str = "bfloat16") -> StoreIdentity:
    teacher = teacher_in(folder, dtype)
    teacher.check("int8")
    model = teacher.load(folder)
    outline = teacher.outline(BLOCKS, "int8")
    identity = teacher.identity(model, find_parts(model), outline)
    assert outline.difference(identity, UNKNOWN) is None
    assert (outline.token_bytes, outline.vocab_size) == (identity.token_bytes, identity.vocab_size)
    return identity


def test_identity(folder: Path, tmp_path: Path) -> None:
    known = identity_in(folder)
    assert (known.ran["dtype"], known.ran["quantisation"]) == ("bfloat16", "no")
    moved = changed(folder, tmp_path / "moved", use_cache=False, _name_or_path="elsewhere", eos_token_id=3)
    assert known.difference(identity_in(moved)) is None
    assert "dtype bfloat16 there" in str(known.difference(identity_in(folder, "float32")))
    other = changed(folder, tmp_path / "other", rms_norm_eps=1e-3)
    assert "architecture" in str(known.difference(identity_in(other)))
    tensors = load_file(moved / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][-1, -1] *= 1.01
    save_file(tensors, moved / "model.safetensors", {"format": "pt"})
    assert str(known.difference(identity_in(moved))).startswith("the weights of ")


def test_a_quantised_teacher_says_how_it_ran(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU transformers multiplies FP8 weights in bfloat16, by itself."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # a rehearsal claims one
    quantisation = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    fp8 = changed(folder, tmp_path / "fp8", quantization_config=quantisation)
    tensors = {}
    for name, tensor in load_file(fp8 / "model.safetensors").items():
        if "_proj" in name:
            tensors[f"{name}_scale_inv"] = torch.full([-(-size // 16) for size in tensor.shape], 0.01)
            tensors[name] = (tensor * 100).to(torch.float8_e4m3fn)
        else:
            tensors[name] = tensor.bfloat16()
    save_file(tensors, fp8 / "model.safetensors", {"format": "pt"})
    assert identity_in(fp8).ran["quantisation"] == "fp8 -> dequantised to bfloat16"
    with pytest.raises(ValueError, match=r"--dtype float32: .* is quantised \(fp8\)"):
        identity_in(fp8, "float32")


FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def test_a_teacher_in_mxfp4_is_the_one_in_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As gpt-oss is published: experts in blocks of 32 numbers of 4 bits, the lower half of a byte first."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # a rehearsal claims one
    model = tiny_model("gpt_oss").bfloat16()
    packed, generator = {}, torch.Generator().manual_seed(3)
    for name, value in model.state_dict().items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            packed[name] = value
            continue
        experts, inputs, outputs = value.shape
        shape = (experts, outputs, inputs // 32)
        blocks = torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(121, 125, shape, dtype=torch.uint8, generator=generator)
        codes = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2).int()
        numbers = FP4[codes & 7] * (1 - 2 * (codes >> 3)) * 2.0 ** (scales.int() - 127)[..., None]
        value.copy_(numbers.flatten(-2).mT)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    model.save_pretrained(tmp_path / "plain")
    path = changed(tmp_path / "plain", tmp_path / "mxfp4", quantization_config={"quant_method": "mxfp4"})
    save_file(packed, path / "model.safetensors", {"format": "pt"})
    assert identity_in(path).ran["quantisation"] == "mxfp4 -> dequantised to bfloat16"
    found = []
    for each in ("plain", "mxfp4"):
        loaded = teacher_in(tmp_path / each, "bfloat16").load(tmp_path)
        found.append(engine_of(loaded, find_parts(loaded), "bf16", "bfloat16").states(units()))
    assert all(np.array_equal(one, other) for one, other in zip(*found, strict=True))


def test_numbers_that_are_no_weights_by_themselves_are_refused(folder: Path, tmp_path: Path) -> None:
    """transformers runs them without their scales, after a warning or without one."""
    tensors = load_file(folder / "model.safetensors")
    scales = {f"{name}_scale": torch.tensor(0.01) for name in tensors if "_proj" in name}
    packed = {
        name: (value * 100).to(torch.float8_e4m3fn) for name, value in tensors.items() if "_proj" in name
    }
    for name, method, wanted in (
        ("modelopt", {"quant_method": "modelopt", "quant_algo": "FP8"}, "is quantised by modelopt, which"),
        ("nameless", {"bits": 4}, "is quantised by one without a name, which"),
        (
            "int8",
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
            "LLM.int8, which keeps those columns",
        ),
        (
            "none",
            None,
            r"layers\.0\.mlp\.down_proj\.weight is stored as F8_E4M3, and config.json has no quant",
        ),
    ):
        path = changed(folder, tmp_path / name, **({} if method is None else {"quantization_config": method}))
        save_file(tensors | scales | packed, path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=wanted):
            teacher_in(path, "bfloat16").check("bf16")


def test_a_quantisation_without_its_package_says_what_to_install(folder: Path, tmp_path: Path) -> None:
    gptq = changed(folder, tmp_path / "gptq", quantization_config={"quant_method": "gptq", "bits": 4})
    teacher = teacher_in(gptq, "bfloat16")
    teacher.check("bf16")
    with pytest.raises(
        ValueError, match=r"does not load \(ImportError: .*\): install what it needs, or give"
    ):
        teacher.load(tmp_path)


def test_an_encoder_and_its_decoder_are_refused(tmp_path: Path) -> None:
    """Without what the encoder has read, a decoder predicts something else; one that was trained alone may teach."""
    model = tiny_model("mbart")
    model.save_pretrained(tmp_path / "alone")
    teacher_in(tmp_path / "alone").check("float32")
    both = changed(tmp_path / "alone", tmp_path / "both", is_encoder_decoder=True)
    with pytest.raises(ValueError, match=r"both: mbart has an encoder, and its decoder predicts nothing"):
        teacher_in(both).check("float32")


def test_nothing_but_safetensors_of_a_known_model_is_read(folder: Path, tmp_path: Path) -> None:
    def refused(path: Path, form: TapForm = "float32") -> str:
        with pytest.raises(ValueError, match=".") as raised:
            teacher_in(path).check(form)
        return str(raised.value)

    assert "is not a Hugging Face model folder" in refused(Path("HuggingFaceTB/SmolLM2-135M"))
    code = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Model"}
    remote = changed(folder, tmp_path / "remote", model_type="evil", auto_map=code)
    (remote / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert "code of a folder is not run" in refused(remote)
    assert not (tmp_path / "ran").exists()
    pickled = changed(folder, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert "holds neither model.safetensors nor" in refused(pickled)
    adapted = changed(folder, tmp_path / "adapted")
    (adapted / "adapter_config.json").write_text("{}")
    assert "has an adapter" in refused(adapted)
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert "depend on the longest row" in refused(changed(folder, tmp_path / "d", rope_parameters=dynamic))
    assert "no causal language model of the type t5" in refused(
        changed(folder, tmp_path / "t5", model_type="t5")
    )
    assert "use --form float32, int8 or fp8, or give another" in refused(folder, "bf16")


def test_a_checkpoint_that_lacks_a_tensor_is_refused(folder: Path, tmp_path: Path) -> None:
    lacking = changed(folder, tmp_path / "lacking", num_hidden_layers=LAYERS + 1)
    teacher = teacher_in(lacking)
    teacher.check("float32")
    with pytest.raises(ValueError, match=r"lacks 9 of the tensors .*model\.layers\.4\.input_layernorm"):
        teacher.load(tmp_path)
