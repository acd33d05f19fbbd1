"""GPT-2: logits, bytes, both ways of naming tensors, and the config values that are refused."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_fdd import convert
from megatron_fdd.convert.families import family_of
from megatron_fdd.convert.families.gpt2 import GPT2
from megatron_fdd.convert.families.transforms import FusedQkv, GroupedQkv
from tests.convert import mcore, toy_gpt2, toys
from tests.harness.ranks import Layout, run_on_ranks

CARRIED = ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja")


def _there_and_back(source: Path, saved: Path, back: Path) -> None:
    convert.hf_to_mcore(source, saved)
    convert.mcore_to_hf(saved, back)


def _check_logits(source: Path, saved: Path) -> None:
    model, args = mcore.from_own_args(saved, padded_vocab_size=256)
    expected = toys.hf_logits(source, toys.TOKENS)
    got = mcore.logits(model.float(), toys.TOKENS)
    assert expected.std() > 0.3
    assert (got[..., :99] - expected).abs().max() < toys.LOGIT_TOLERANCE
    assert args.position_embedding_type == "learned_absolute"


def _convert(tmp_path: Path) -> dict[str, Path]:
    folders = {name: tmp_path / name for name in ("source", "saved", "back")}
    run_on_ranks(_there_and_back, Layout(tp=1), folders)
    return folders


def _check_carried(source: Path, back: Path) -> None:
    for name in CARRIED:
        assert (back / name).read_bytes() == (source / name).read_bytes(), name


@pytest.mark.tier("default")
@pytest.mark.parametrize("variant", list(toy_gpt2.VARIANTS))
def test_there_and_back(tmp_path: Path, variant: str) -> None:
    toy_gpt2.make_gpt2(tmp_path / "source", variant)
    folders = _convert(tmp_path)
    assert toys.tensor_hashes(folders["back"]) == toys.tensor_hashes(folders["source"])
    _check_carried(folders["source"], folders["back"])
    for ranks in (1, 2):
        arguments = {"source": folders["source"], "saved": folders["saved"]}
        run_on_ranks(_check_logits, Layout(tp=ranks), arguments)


@pytest.mark.tier("default")
def test_names_without_the_prefix_as_the_hub_has_them(tmp_path: Path) -> None:
    source = toy_gpt2.make_gpt2(tmp_path / "source")
    expected = toy_gpt2.strip_prefix(source)
    folders = _convert(tmp_path)
    # The export has the names that save_pretrained writes; the masks are not weights.
    assert toys.tensor_hashes(folders["back"]) == expected
    assert torch.equal(toys.hf_logits(source, toys.TOKENS), toys.hf_logits(folders["back"], toys.TOKENS))


def test_mixed_names_are_listed(tmp_path: Path) -> None:
    source = toy_gpt2.make_gpt2(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["wpe.weight"] = tensors.pop("transformer.wpe.weight")
    tensors["transformer.h.0.attn.extra"] = torch.zeros(1)
    save_file(tensors, source / "model.safetensors")
    listed = "Missing: transformer.wpe.weight. Not used: transformer.h.0.attn.extra, wpe.weight"
    with pytest.raises(ValueError, match=listed):
        convert.hf_to_mcore(source, tmp_path / "saved")


@pytest.mark.parametrize("bare", [False, True])
def test_a_student_of_two_layers(tmp_path: Path, bare: bool) -> None:
    teacher = toy_gpt2.make_gpt2(tmp_path / "teacher")
    before = toys.tensor_hashes(teacher)
    if bare:
        toy_gpt2.strip_prefix(teacher)
        before = {name.removeprefix("transformer."): value for name, value in before.items()}
    convert.init_student(teacher, [0, 2], tmp_path / "student")
    kept = {name.replace("h.2.", "h.1."): value for name, value in before.items() if "h.1." not in name}
    assert toys.tensor_hashes(tmp_path / "student") == kept
    assert toys.read_json(tmp_path / "student" / "config.json") == toy_gpt2.config(n_layer=2)
    assert convert.count_layers(tmp_path / "student") == 2
    assert toys.hf_logits(tmp_path / "student", toys.TOKENS).isfinite().all()


def test_one_tensor_of_query_key_and_value() -> None:
    qkv = FusedQkv(GroupedQkv(queries_per_group=2, head_dim=1))
    fused = torch.arange(8)  # 4 queries, 2 keys, 2 values
    grouped = torch.tensor([0, 1, 4, 6, 2, 3, 5, 7])
    assert torch.equal(qkv.join([fused]), grouped)
    assert torch.equal(qkv.split(grouped)[0], fused)


def _args(config: dict[str, Any], **changes: Any) -> Namespace:
    return Namespace(**{**GPT2.megatron_args(config), **changes})


@pytest.mark.parametrize("variant", list(toy_gpt2.VARIANTS))
def test_the_way_back_leaves_the_config_alone(variant: str) -> None:
    config = toy_gpt2.config(variant)
    assert GPT2.hf_config(config, _args(config)) == config
    assert GPT2.hf_config(config, _args(config, vocab_size=None)) == config


def test_another_model_in_the_seed_is_overwritten() -> None:
    seed = toy_gpt2.config(pad_token_id=3)
    target = toy_gpt2.config(
        "erf", n_embd=32, n_layer=5, n_positions=32, n_ctx=32, vocab_size=77, tie_word_embeddings=False
    )
    got = GPT2.hf_config(seed, _args(target))
    assert got == {**target, "pad_token_id": 3}
    assert GPT2.megatron_args(got) == GPT2.megatron_args(target)
    # A width that is four times the seed's hidden size is no longer the implied one.
    assert GPT2.hf_config(seed, _args(toy_gpt2.config(n_embd=32, n_inner=192)))["n_inner"] == 192


def test_absent_fields_have_the_values_of_transformers() -> None:
    from transformers import GPT2Config

    args = GPT2.megatron_args({"model_type": "gpt2"})
    config = GPT2Config()
    assert args["ffn_hidden_size"] == 4 * config.n_embd == 3072
    written = {"model_type": "gpt2", **config.to_dict(), "architectures": None}
    assert GPT2.megatron_args(written) == args


def test_heads_that_do_not_fill_the_hidden_size_have_no_gpt2() -> None:
    config = toy_gpt2.config()
    with pytest.raises(ValueError, match="4 heads of width 10 on a hidden size of 48"):
        GPT2.hf_config(config, _args(config, kv_channels=10))


REFUSED = {
    "architectures": ["GPT2Model"],
    "scale_attn_weights": False,
    "scale_attn_by_inverse_layer_idx": True,
    "add_cross_attention": True,
    "n_ctx": 32,
    "activation_function": "relu",
    "n_head": 5,
    "embd_pdrop": 0.2,
    "rope_theta": 1e4,
    "quantization_config": {"bits": 4},
}


@pytest.mark.parametrize("field", list(REFUSED))
def test_what_changes_the_function_is_refused_by_name(field: str) -> None:
    config = toy_gpt2.config(**{field: REFUSED[field]})
    with pytest.raises(ValueError, match=field):
        family_of(config).megatron_args(config)
