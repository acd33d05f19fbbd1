"""Conversion through Megatron-Bridge, with a stand-in for the package, which is not installed where these tests run.

README.md reports the results with the real package.
"""

from __future__ import annotations

import json
import re
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_fdd import convert
from megatron_fdd.convert.bridge import CHECKED
from megatron_fdd.convert.families import FAMILIES, VIA_BRIDGE, family_of
from megatron_fdd.convert.mcore_checkpoint import stored_layout
from megatron_fdd.host.checkpoint import RELEASE
from megatron_fdd.step.teacher.arguments import teacher_args
from tests.convert import fake_bridge, mcore, toys
from tests.harness.ranks import distributed

SHAPE: dict[str, Any] = {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0, "partial_rotary_factor": 0.5},
    "rms_norm_eps": 1e-5,
    "num_nextn_predict_layers": 1,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
PREDICTION = "model.layers.3.eh_proj.weight"


def _make(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Make a tiny GLM-4.5 with multi-token prediction and float32 router biases."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True)
    config = {**SHAPE, **changes}
    toys.write_json(folder / "config.json", config)
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "inv_freq" not in name:
            tensor.data = torch.randn(tensor.shape) * 0.15 + 1.0 * ("norm" in name)
    model.save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    stored = {name: t if "e_score" in name else t.to(dtype) for name, t in stored.items()}
    save_file({**stored, PREDICTION: torch.ones(32, 64, dtype=dtype)}, folder / "model.safetensors")
    toys.write_json(folder / "config.json", config)
    toys.write_json(folder / "generation_config.json", {"eos_token_id": 2})
    toys.make_tokenizer(folder)
    return folder


@distributed(tp=1)
def test_there_and_back(tmp_path: Path) -> None:
    source, saved, back = _make(tmp_path / "source"), tmp_path / "mcore", tmp_path / "back"
    with fake_bridge.installed():
        parameters = convert.hf_to_mcore(source, saved, via="bridge")
    model, args = mcore.from_own_args(saved)
    got, expected = mcore.logits(model, toys.TOKENS), toys.hf_logits(source, toys.TOKENS)
    assert expected.std() > 0.3
    assert got.shape[-1] == args.padded_vocab_size == 128
    assert (got[..., :99] - expected).abs().max() < toys.LOGIT_TOLERANCE
    assert got[..., 99:].abs().max() == 0.0
    assert stored_layout(saved / RELEASE) == (torch.float32, 128)
    assert args.tokenizer_model == str(saved / "tokenizer")
    with fake_bridge.installed():
        exported = convert.mcore_to_hf(saved, back, via="bridge", max_shard_size="20KB")
    hashes = toys.tensor_hashes(source)
    del hashes[PREDICTION]
    assert toys.tensor_hashes(back) == hashes
    assert len(list(back.glob("*.safetensors"))) > 2
    assert (exported.num_tensors, exported.unchanged) == (len(hashes), len(hashes))
    stored = load_file(source / "model.safetensors")
    assert parameters == sum(stored[name].numel() for name in hashes)
    assert json.loads((back / "config.json").read_text()) == {**SHAPE, "num_nextn_predict_layers": 0}
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (back / name).read_bytes() == (source / name).read_bytes(), name


@distributed(tp=1)
def test_router_biases_stay_float32_in_bfloat16(tmp_path: Path) -> None:
    source, saved, back = _make(tmp_path / "source", torch.bfloat16), tmp_path / "mcore", tmp_path / "back"
    with fake_bridge.installed():
        convert.hf_to_mcore(source, saved, via="bridge")
        exported = convert.mcore_to_hf(saved, back, via="bridge")
    hashes = toys.tensor_hashes(source)
    del hashes[PREDICTION]
    assert toys.tensor_hashes(back) == hashes
    assert exported.unchanged == len(hashes)
    tensors = load_file(back / "model.safetensors")
    assert {tensors[name].dtype for name in tensors if "e_score" in name} == {torch.float32}
    assert tensors["lm_head.weight"].dtype == torch.bfloat16


def _scale(provider: fake_bridge.Provider) -> None:
    provider.softmax_scale = 0.3


def _relu(provider: fake_bridge.Provider) -> None:
    provider.activation_func = torch.nn.functional.relu


def _more_norms(provider: fake_bridge.Provider) -> None:
    provider.qk_layernorm = True


def _forgets(name: str, value: Tensor) -> Tensor | None:
    return None if name == "decoder.layers.1.mlp.router.expert_bias" else value


def _rounds(name: str, value: Tensor) -> Tensor:
    return value.bfloat16().float() if name == "decoder.layers.2.pre_mlp_layernorm.weight" else value


def _leaves_out(rows: fake_bridge.Rows) -> fake_bridge.Rows:
    return [row for row in rows if row[0] != "lm_head.weight"]


def _invents(rows: fake_bridge.Rows) -> fake_bridge.Rows:
    return [*rows, ("model.extra", torch.zeros(1))]


def _breaks(rows: fake_bridge.Rows) -> fake_bridge.Rows:
    raise KeyError("a mapping\nand much more")


FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"describe": _scale}, "softmax_scale = 0.3 (the arguments give None)"),
    ({"describe": _relu}, "activation_func = "),
    (
        {"describe": _more_norms},
        "finds nothing for, or NaN in: decoder.layers.0.self_attention.q_layernorm.weight",
    ),
    ({"garble": _forgets}, "decoder.layers.1.mlp.router.expert_bias"),
    ({"garble": _rounds}, "does not convert model.layers.2.post_attention_layernorm.weight exactly"),
    ({"lists": _leaves_out}, "leaves out lm_head.weight"),
    ({"lists": _invents}, "lacks model.extra"),
    ({"lists": _breaks}, "cannot convert this glm4_moe: KeyError: 'a mapping"),
    (
        {"version": "0.7.0"},
        "checked with Megatron-Bridge 0.6.2; 0.7.0 is here: pip install megatron-bridge==0.6.2",
    ),
    ({"requirement": "transformers<=5.12.1,>=5.8"}, "pip install 'transformers<=5.12.1,>=5.8'"),
]


@pytest.mark.parametrize(("fault", "told"), FAULTS, ids=[told[:30] for _, told in FAULTS])
@distributed(tp=1)
def test_what_goes_wrong_is_named(tmp_path: Path, fault: dict[str, Any], told: str) -> None:
    source = _make(tmp_path / "source")
    with fake_bridge.installed(**fault), pytest.raises(ValueError, match=re.escape(told)) as error:
        convert.hf_to_mcore(source, tmp_path / "mcore", via="bridge")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "mcore").exists()


@distributed(tp=1)
def test_settings_that_the_bridge_does_not_read_are_refused(tmp_path: Path) -> None:
    source = _make(tmp_path / "source", norm_topk_prob=False)
    with fake_bridge.installed(), pytest.raises(ValueError, match='"norm_topk_prob": False'):
        convert.hf_to_mcore(source, tmp_path / "mcore", via="bridge")


@distributed(tp=1)
def test_a_checkpoint_of_another_model_is_not_exported(tmp_path: Path) -> None:
    source, saved = _make(tmp_path / "source"), tmp_path / "mcore"
    with fake_bridge.installed():
        convert.hf_to_mcore(source, saved, via="bridge")
        toys.write_json(saved / "hf" / "config.json", {**SHAPE, "routed_scaling_factor": 2.5})
        with pytest.raises(ValueError, match=r"moe_router_topk_scaling_factor = 1\.5 \(needs 2\.5\)"):
            convert.mcore_to_hf(saved, tmp_path / "back", via="bridge")


@distributed(tp=1)
def test_what_the_run_chooses_may_differ(tmp_path: Path) -> None:
    source, saved, trained = _make(tmp_path / "source"), tmp_path / "mcore", tmp_path / "trained"
    with fake_bridge.installed():
        convert.hf_to_mcore(source, saved, via="bridge")
    model, args = mcore.from_own_args(saved)
    args.calculate_per_token_loss, args.seq_length, args.moe_aux_loss_coeff = True, 32, 0.0
    args.recompute_granularity, args.hidden_dropout = "full", 0.1
    mcore.save(trained, model, args)
    with fake_bridge.installed():
        exported = convert.mcore_to_hf(
            trained, tmp_path / "back", via="bridge", hf_config=source, tokenizer=source
        )
    assert exported.num_tensors == len(toys.tensor_hashes(source)) - 1


@distributed(tp=1)
def test_models_with_a_table_and_others_unchecked(tmp_path: Path) -> None:
    assert not set(CHECKED) & set(FAMILIES)
    assert set(CHECKED) == set(VIA_BRIDGE)
    with pytest.raises(ValueError, match="'glm4_moe', for which there is no table: try --via bridge"):
        family_of(SHAPE)
    toys.make_llama(tmp_path / "llama")
    with (
        fake_bridge.installed(),
        pytest.raises(ValueError, match="llama needs no Megatron-Bridge: leave out --via"),
    ):
        convert.hf_to_mcore(tmp_path / "llama", tmp_path / "mcore", via="bridge")
    toys.write_json(tmp_path / "llama" / "config.json", {**SHAPE, "model_type": "ernie4_5_moe"})
    with (
        fake_bridge.installed(),
        pytest.raises(ValueError, match="converts deepseek_v3, glm4_moe, gpt_oss, nemotron"),
    ):
        convert.hf_to_mcore(tmp_path / "llama", tmp_path / "mcore", via="bridge")


@distributed(tp=1)
def test_without_the_package(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a GPU and TransformerEngine: pip install megatron-bridge"):
        convert.hf_to_mcore(_make(tmp_path / "source"), tmp_path / "mcore", via="bridge")


class _WithoutCuda(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise OSError("libcudart.so: cannot open\nand more")


@distributed(tp=1)
def test_a_package_that_breaks_on_import(tmp_path: Path) -> None:
    with (
        mock.patch.dict(sys.modules, {"megatron.bridge": _WithoutCuda("megatron.bridge")}),
        pytest.raises(ValueError, match=r"cannot be imported \(libcudart.so: cannot open\)\. It needs a GPU"),
    ):
        convert.hf_to_mcore(_make(tmp_path / "source"), tmp_path / "mcore", via="bridge")


@distributed(dp=2)
def test_several_ranks_are_refused(tmp_path: Path) -> None:
    if dist.get_rank() == 0:
        _make(tmp_path / "source")
    dist.barrier()
    with fake_bridge.installed(), pytest.raises(ValueError, match="start it without torchrun"):
        convert.hf_to_mcore(tmp_path / "source", tmp_path / "mcore", via="bridge")


def test_a_teacher_with_latent_attention_needs_transformer_engine() -> None:
    stored = Namespace(num_layers=2, multi_latent_attention=True)
    with pytest.raises(ValueError, match="--teacher-load: .* --transformer-impl transformer_engine"):
        teacher_args(stored, Namespace(transformer_impl="local"))
