"""The engine `transformers`: parts found without names, states by hooks, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.tiny_teachers import LAYERS, VOCABULARY, WIDTH, tiny_model
from megatron_fdd.data.store.coverage import Ids
from megatron_fdd.data.store.identity import StoreIdentity, TapForm
from megatron_fdd.data.store.lens import StoredLens
from megatron_fdd.losses.lens import FinalNorm
from megatron_fdd.step.teacher.tap_format import TapFormat
from megatron_fdd.teach.hf_parts import Parts, find_parts
from megatron_fdd.teach.hf_teacher import DTYPES, HfTeacher
from megatron_fdd.teach.transformers import TransformersEngine

LENGTHS = (11, 5, 3, 11)
BLOCKS = (1, 3, 4)
# Differences of float32 states, relative to the largest, between a row alone and among others; and where a model sums
# along the row in another order.
SAME_ROWS, SAME_SUMS = 2e-6, 5e-6

# Each stands for a kind: of norm, constant, layer, or mixture of experts.
KINDS: dict[str, tuple[str, bool, float]] = {
    "llama": ("rms", False, 1.0),
    "gpt2": ("layer", True, 1.0),
    "cohere": ("layer", False, 0.25),
    "granite": ("rms", False, 0.125),
    "gemma": ("rms", False, 1.0),
    "olmo": ("layer", False, 1.0),
    "falcon_h1": ("rms", False, 0.2),
    "mamba": ("rms", False, 1.0),
    "deepseek_v3": ("rms", False, 1.0),
    "gpt_oss": ("rms", False, 1.0),
}


def units(lengths: Sequence[int] = LENGTHS) -> list[Ids]:
    rng = np.random.default_rng(1)
    return [rng.integers(3, VOCABULARY, length).astype(np.int32) for length in lengths]


def engine_of(
    model: Any, parts: Parts, form: TapForm = "float32", dtype: str = "float32"
) -> TransformersEngine:
    packing = TapFormat(DTYPES[dtype], form)
    identity = StoreIdentity(
        engine="transformers",
        teacher="toy",
        weights="",
        final_norm="",
        architecture="",
        num_layers=LAYERS,
        hidden_size=WIDTH,
        vocab_size=VOCABULARY,
        blocks=list(BLOCKS),
        form=form,
        token_bytes=packing.token_bytes(WIDTH),
        ran={"dtype": dtype},
    )
    return TransformersEngine(identity, model, parts)


def unpacked(states: np.ndarray) -> Tensor:
    """Return float32 states [T, S, width]."""
    return torch.from_numpy(states).view(torch.float32)


@torch.no_grad()
def plain_states(model: Any, ids: Ids) -> tuple[list[Tensor], Tensor]:
    """Return the outputs of all blocks, as the residual stream has them, and the logits: one row, the whole model.

    A block's output is what the next block is given; the last block's is what the final norm is given.
    """
    given: dict[int, Tensor] = {}

    def keep(number: int) -> Any:
        def hook(_module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            given[number] = positional[0] if positional else named["hidden_states"]

        return hook

    inner = model.base_model
    layers = next(each for each in inner.children() if isinstance(each, nn.ModuleList))
    norm = [each for each in inner.children() if "norm" in type(each).__name__.lower()][-1]
    hooks = [
        each.register_forward_pre_hook(keep(number), with_kwargs=True)
        for number, each in enumerate([*layers, norm])
    ]
    logits = model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0]
    for hook in hooks:
        hook.remove()
    return [given[block][0] for block in range(1, LAYERS + 1)], logits


def logits_of(lens: StoredLens, hidden_ST: Tensor) -> Tensor:
    norm = lens.norm
    return FinalNorm(norm.weight_T, norm.bias_T, norm.epsilon, norm.kind)(hidden_ST) @ lens.head_VT.T


@pytest.mark.parametrize("model_type", KINDS)
def test_states_and_lens_are_the_models(model_type: str) -> None:
    model = tiny_model(model_type)
    parts = find_parts(model)
    kind, has_bias, constant = KINDS[model_type]
    assert (parts.norm.kind, parts.norm.bias_T is not None) == (kind, has_bias)
    assert parts.constant == pytest.approx(constant, rel=1e-6)
    engine, texts, tolerance = (
        engine_of(model, parts),
        units(),
        SAME_SUMS if "mamba" in model_type else SAME_ROWS,
    )
    lens = engine.lens(texts[:2])
    assert lens.error <= 1e-5
    for ids, found in zip(texts, engine.states(texts), strict=True):
        wanted, logits = plain_states(model, ids)
        states = unpacked(found)
        assert states.shape == (len(BLOCKS), len(ids), WIDTH)
        for row, block in enumerate(BLOCKS):
            largest = float(wanted[block - 1].abs().max())
            torch.testing.assert_close(states[row], wanted[block - 1], atol=tolerance * largest, rtol=0)
        scale = float(logits.abs().max())
        torch.testing.assert_close(logits_of(lens, states[-1]), logits, atol=2e-5 * scale, rtol=0)


def test_states_depend_on_the_unit_alone() -> None:
    model = tiny_model("llama")
    engine, texts = engine_of(model, find_parts(model)), units((3, 29, 12, 29))
    together = engine.states(texts)
    for ids, found in zip(texts, together, strict=True):
        [alone] = engine.states([ids])
        torch.testing.assert_close(unpacked(found), unpacked(alone), atol=SAME_ROWS, rtol=0)
    assert not np.array_equal(together[1], together[3])


def test_rows_keep_to_one_side_of_the_length_at_which_all_positions_change() -> None:
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "rope_theta": 1e4}
    rope |= {"factor": 2.0, "original_max_position_embeddings": 64}
    model, texts = tiny_model("llama", rope_parameters=rope), units((4, 80, 64, 65))
    parts = find_parts(model)
    heedless = engine_of(model, parts)
    bounded = TransformersEngine(heedless.identity, model, parts, (64,))
    apart = [unpacked(heedless.states([ids])[0]) for ids in texts]
    for found, wanted in zip(bounded.states(texts), apart, strict=True):
        torch.testing.assert_close(unpacked(found), wanted, atol=SAME_ROWS, rtol=0)
    assert float((unpacked(heedless.states(texts)[0]) - apart[0]).abs().max()) > 1e-3


@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_states_are_packed(form: TapForm) -> None:
    model = tiny_model("llama")
    parts, texts = find_parts(model), units()
    plain, packed = engine_of(model, parts), engine_of(model, parts, form)
    for whole, found in zip(plain.states(texts), packed.states(texts), strict=True):
        assert torch.equal(torch.from_numpy(found), TapFormat(torch.float32, form).pack(unpacked(whole)))


def test_a_layer_too_early_is_noticed() -> None:
    model = tiny_model("llama")
    parts = find_parts(model)
    shifted = replace(parts, layers=[parts.layers[0], *parts.layers[:-1]])
    with pytest.raises(
        ValueError, match=r"logits are not those of model\.norm and lm_head .*something else lies"
    ):
        engine_of(model, shifted).lens(units())


def test_states_that_are_not_finite_are_refused() -> None:
    model = tiny_model("llama")
    engine = engine_of(model, find_parts(model))
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = torch.inf
    texts = [ids[ids != 7] for ids in units()]
    engine.states(texts)
    with pytest.raises(ValueError, match="a hidden state is not finite"):
        engine.states([*texts, np.array([3, 7], np.int32)])


REFUSED = {
    "gemma2": r"its logits have a soft cap of 30\.0, which the losses do not know yet",
    "phi": "its head lm_head has a bias",
    "deepseek_v4": r"gives \[1, 32, 4, 64\] where .* is \[1, 32, 64\]; several residual streams",
    "bert": r"runs cls.predictions.transform.dense \(Linear\), .*, and a lens is one norm and a linear head",
    "modernbert-decoder": r"runs model.final_norm \(LayerNorm\), lm_head.dense \(Linear\), lm_head.act \(GELU",
    "openai-gpt": "between its last layer and its head runs no norm",
    "xlm": "first tokens change by .* when the row goes on: it is no causal model",
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_other_models_are_refused_by_name(model_type: str) -> None:
    model = tiny_model(model_type)
    with pytest.raises(ValueError, match=REFUSED[model_type]):
        engine_of(model, find_parts(model))


class Squashed(nn.Module):
    """A norm that no lens knows."""

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.tanh(hidden)


def test_a_norm_of_another_kind_is_refused() -> None:
    model = tiny_model("llama")
    model.model.norm = Squashed()
    with pytest.raises(ValueError, match=r"model\.norm \(Squashed\), is neither an RMSNorm nor a LayerNorm"):
        find_parts(model)


def test_what_no_module_does_is_noticed() -> None:
    model = tiny_model("llama")
    model.lm_head.register_forward_hook(lambda _module, _given, logits: logits + 0.05 * logits**2)
    with pytest.raises(ValueError, match="logits are not those of"):
        find_parts(model)


def test_epsilon_is_measured() -> None:
    """Some norms have theirs in the code; others have several attributes."""
    model = tiny_model("llama", rms_norm_eps=3e-4)
    model.model.norm.other = 1e-3
    assert find_parts(model).norm.epsilon == 3e-4


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
        engine = TransformersEngine(teacher.identity(model, parts, BLOCKS, "float32"), model, parts)
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
    return teacher.identity(model, find_parts(model), BLOCKS, "int8")


def test_identity(folder: Path, tmp_path: Path) -> None:
    known = identity_in(folder)
    assert (known.ran["dtype"], known.ran["quantisation"]) == ("bfloat16", "no")
    moved = changed(folder, tmp_path / "moved", use_cache=False, _name_or_path="elsewhere", eos_token_id=3)
    assert known.difference(identity_in(moved)) is None
    assert "its dtype is bfloat16" in str(known.difference(identity_in(folder, "float32")))
    other = changed(folder, tmp_path / "other", rms_norm_eps=1e-3)
    assert "its architecture is" in str(known.difference(identity_in(other)))
    tensors = load_file(moved / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"] *= 1.01
    save_file(tensors, moved / "model.safetensors", {"format": "pt"})
    assert "its weights is" in str(known.difference(identity_in(moved)))


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


def test_nothing_but_safetensors_of_a_known_model_is_read(folder: Path, tmp_path: Path) -> None:
    def refused(path: Path, form: TapForm = "float32") -> str:
        with pytest.raises(ValueError, match=".") as raised:
            teacher_in(path).check(form)
        return str(raised.value)

    assert "is not a Hugging Face model folder" in refused(Path("HuggingFaceTB/SmolLM2-135M"))
    code = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Model"}
    remote = changed(folder, tmp_path / "remote", model_type="evil", auto_map=code)
    (remote / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert "custom code" in refused(remote)
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
    assert "use --form float32, or give another" in refused(folder, "bf16")


def test_a_checkpoint_that_lacks_a_tensor_is_refused(folder: Path, tmp_path: Path) -> None:
    lacking = changed(folder, tmp_path / "lacking", num_hidden_layers=LAYERS + 1)
    teacher = teacher_in(lacking)
    teacher.check("float32")
    with pytest.raises(ValueError, match=r"lacks 9 of the tensors .*model\.layers\.4\.input_layernorm"):
        teacher.load(tmp_path)
