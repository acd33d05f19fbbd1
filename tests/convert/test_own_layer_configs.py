"""Families with their own layers: both spellings of their configs, all refusals, and the table of layers."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from transformers.models.gemma2.configuration_gemma2 import Gemma2Config
from transformers.models.gemma3.configuration_gemma3 import Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.ministral3.configuration_ministral3 import Ministral3Config
from transformers.models.olmo2.configuration_olmo2 import Olmo2Config

from megatron_fdd.config import FddConfig
from megatron_fdd.convert import families
from megatron_fdd.convert.families import FAMILIES, add_family, family_of
from megatron_fdd.convert.mcore_model import complete_args
from megatron_fdd.host import layer_specs
from megatron_fdd.host.model import build_config
from megatron_fdd.host.patches.norms import RMSNorm
from megatron_fdd.host.role import Role
from megatron_fdd.plan.context import Context, Model, StoredModel
from megatron_fdd.plan.modules import check_layers
from megatron_fdd.plan.teacher_checkpoint import check_teacher_model
from tests.convert import toys


def _args(config: dict[str, Any]) -> dict[str, Any]:
    return family_of(config).megatron_args(config)


def _complete(config: dict[str, Any], **options: Any) -> Namespace:
    family = family_of(config)
    architecture = {**family.fixed, **family.megatron_args(config)}
    return complete_args(architecture, **{"dtype": torch.float32, "vocabulary_divisor": 8, **options})


def _as_transformers_writes_it(variant: str) -> dict[str, Any]:
    config = toys.llama_config(variant)
    kind = {"gemma2": Gemma2Config, "gemma3_text": Gemma3TextConfig, "olmo2": Olmo2Config}[variant]
    return json.loads(kind(**config).to_json_string(use_diff=False))


@pytest.mark.parametrize("variant", ["gemma2", "gemma3_text", "olmo2"])
def test_a_config_as_transformers_writes_it_means_the_same(variant: str) -> None:
    written = _as_transformers_writes_it(variant)
    assert "rope_parameters" in written
    assert _args(written) == _args(toys.llama_config(variant))
    assert family_of(written).hf_config(written, Namespace(**_args(written))) == written
    student = family_of(written).keep_layers(written, [0, 2])
    assert _args(student) == _args(family_of(written).keep_layers(toys.llama_config(variant), [0, 2]))
    assert "rope_theta" not in student


def test_what_a_silent_config_means_is_what_transformers_takes() -> None:
    bare = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
    assert _args(bare) == _args(json.loads(Gemma3TextConfig().to_json_string(use_diff=False)))
    assert _args(bare)["window_attn_skip_freq"][:7] == [1, 1, 1, 1, 1, 0, 1]
    bare = {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}
    assert _args(bare) == _args(json.loads(Gemma2Config().to_json_string(use_diff=False)))
    assert _args(bare)["window_attn_skip_freq"] == [1, 0] * 13
    assert _args(bare)["fdd_layer_options"]["final_logit_softcapping"] == 30.0
    bare = {"model_type": "ministral3", "architectures": ["Ministral3ForCausalLM"]}
    assert _args(bare) == _args(json.loads(Ministral3Config().to_json_string(use_diff=False)))
    bare = {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"]}
    assert _args(bare) == _args(json.loads(Olmo2Config().to_json_string(use_diff=False)))


def test_gemmas_layers() -> None:
    args = _args(toys.llama_config("gemma3_text"))
    assert (args["window_size"], args["window_attn_skip_freq"]) == ((6, 0), [1, 1, 0])
    assert args["fdd_layer_options"] == {"query_pre_attn_scalar": 13, "rope_local_base_freq": 10000.0}
    assert args["rotary_base"] == 1000000


@pytest.mark.parametrize("written", [False, True])
def test_a_trained_gemma_of_other_bases(written: bool) -> None:
    seed = _as_transformers_writes_it("gemma3_text") if written else toys.llama_config("gemma3_text")
    options = {"query_pre_attn_scalar": 20, "rope_local_base_freq": 5000.0}
    args = {**_args(seed), "fdd_layer_options": options, "rotary_base": 70000}
    got = family_of(seed).hf_config(seed, Namespace(**args))
    assert _args(got) == args
    assert ("rope_local_base_freq" in got) != written
    assert Gemma3TextConfig(**got).rope_parameters == {  # transformers reads it in the same way
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 70000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
    }


@pytest.mark.parametrize(
    ("variant", "changes", "named"),
    [
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3_text", {"hidden_activation": "silu"}, "hidden_activation"),
        ("gemma3_text", {"attention_bias": True}, "attention_bias"),
        ("gemma3_text", {"sliding_window": None}, "layer_types"),
        ("gemma3_text", {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "rope_type.*yarn"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 1e6}}, "rope_parameters"),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "rope_parameters",
        ),
        ("gemma2", {"final_logit_softcapping": 0}, "final_logit_softcapping.*above 0"),
        ("gemma2", {"attn_logit_softcapping": -50.0}, "attn_logit_softcapping.*above 0"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma2", {"sliding_window": None}, "layer_types"),
        ("olmo2", {"attention_bias": True}, "attention_bias"),
        ("granite", {"residual_multiplier": 0}, "residual_multiplier.*above 0"),
        ("granitemoe", {"shared_intermediate_size": 24}, "shared_intermediate_size"),
        ("glm4", {"rope_scaling": toys.YARN}, "rope_type.*yarn"),
        ("exaone4", {"layer_types": None}, "sliding_window_pattern.*LLLG.*a number alone"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv"),
        ("minimax_m2", {"attn_type_list": [1, 0, 1]}, "attn_type_list"),
        ("minimax_m2", {"scoring_func": "softmax"}, "scoring_func"),
        ("olmo3", {"rope_theta": 1e4}, "rope_theta.*say both in rope_parameters"),
        ("hunyuan_v1_dense", {"use_qk_norm": False}, "use_qk_norm"),
        ("hunyuan_v1_dense", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.*alpha"),
        (
            "hunyuan_v1_dense",
            {"rope_scaling": {"type": "dynamic", "alpha": 9, "new": 1}},
            "new is not understood",
        ),
        ("ernie4_5_moe", {"moe_layer_interval": 0}, "moe_layer_interval"),
        ("ernie4_5_moe", {"moe_norm_min": 0.1}, "moe_norm_min"),
        ("cohere2", {"use_qk_norm": True}, "use_qk_norm"),
        ("llama4_text", {"use_qk_norm": True}, "use_qk_norm"),
        ("llama4_text", {"num_experts_per_tok": 2}, "num_experts_per_tok"),
        ("llama4_text", {"layer_types": ["full_attention"] * 3}, "layer_types.*no_rope_layers"),
        ("ministral3", {"rope_parameters": {"rope_type": "yarn"}}, "llama_4_scaling_beta.*a number"),
        (
            "ministral3",
            {"rope_parameters": {"type": "yarn", "llama_4_scaling_beta": 0.1}},
            "original_max_position_embeddings.*from which on",
        ),
        (
            "ministral3",
            {"rope_parameters": {"rope_type": "linear", "llama_4_scaling_beta": 0}},
            "rope_type.*linear",
        ),
        ("olmo2", {"sliding_window": 5}, "sliding_window"),
    ],
)
def test_configs_refused_by_name(variant: str, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        _args(toys.llama_config(variant, **changes))


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 48**0.5), (torch.bfloat16, 6.9375)])
def test_what_no_argument_says(dtype: torch.dtype, factor: float) -> None:
    config = build_config(_complete(toys.llama_config("gemma3_text"), dtype=dtype))
    transformer = config.transformer
    assert transformer.mup_embedding_mult == pytest.approx(factor, rel=1e-7)
    assert transformer.softmax_scale == 13**-0.5
    assert (transformer.mup_output_mult, transformer.mup_width_mult) == (1.0, 1.0)
    assert config.transformer_layer_spec is not None
    assert build_config(_complete(toys.llama_config("plain"))).transformer_layer_spec is None


def test_keys_that_ranks_would_have_to_share() -> None:
    args = _complete(toys.llama_config("olmo2", num_key_value_heads=2))
    args.tensor_model_parallel_size = args.tensor_parallel_num_weight_shards = 2
    assert build_config(args).transformer.tensor_model_parallel_size == 2
    args.tensor_model_parallel_size = args.tensor_parallel_num_weight_shards = 4
    with pytest.raises(
        ValueError, match="--tensor-model-parallel-size 4: the 2 key heads of this olmo2.*divides them"
    ):
        build_config(args)


def test_unknown_layers() -> None:
    args = _complete(toys.llama_config("plain"))
    args.fdd_layer_spec = "os.system"
    with pytest.raises(
        ValueError, match="layers named 'os.system'.*nothing here describes.*gemma3_text, .*olmo2"
    ):
        build_config(args)
    with pytest.raises(
        ValueError, match="the teacher's layers are those of 'os.system'.*gemma3_text, .*olmo2"
    ):
        check_layers(Model(Role.TEACHER, args, None))
    args.fdd_layer_spec = "llama"  # a family, but without its own layers
    with pytest.raises(ValueError, match="'llama', which no family here has"):
        check_layers(Model(Role.STUDENT, args, None))
    args.fdd_layer_spec, args.spec = "olmo2", ["some.module", "layers"]
    with pytest.raises(ValueError, match="--spec some.module layers: .*olmo2; leave --spec out"):
        build_config(args)


def test_a_teacher_that_names_code_to_import() -> None:
    teacher = StoredModel("teacher", "--teacher-load", Path(), Namespace(spec=["some.module", "layers"]))
    with pytest.raises(ValueError, match="--spec some.module layers, and nothing is imported by a name"):
        check_teacher_model(Context(FddConfig(teacher_load="teacher"), Namespace(), stored_teacher=teacher))


def test_a_family_is_added_once() -> None:
    with patch.dict(FAMILIES), patch.dict(layer_specs._SPECS):
        twin = replace(FAMILIES["olmo2"], model_type="twin")
        add_family(twin)
        assert family_of({"model_type": "twin"}).fixed["fdd_layer_spec"] == "twin"
        assert families.FAMILIES["llama"].fixed["fdd_layer_spec"] is None
        with pytest.raises(ValueError, match="a family for the model type 'twin' already"):
            add_family(twin)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", ["own"]),
        ("rows", None),
        ("fixed", []),
        ("ignored", "abc"),
        ("tied", ("one",)),
        ("layer_prefix", None),
        ("layer_spec", lambda _config: None),
        ("layer_spec", layer_specs.LayerSpec("module.layer")),  # type: ignore[arg-type]
    ],
)
def test_a_family_with_a_field_of_another_type_is_refused(field: str, value: object) -> None:
    wrong: Any = replace(FAMILIES["olmo2"], **{"model_type": "own", field: value})
    with pytest.raises(ValueError, match=f"the family .* has {field} "):
        add_family(wrong)
    with pytest.raises(ValueError, match="a family must be a Family: 7 is none"):
        add_family(7)  # type: ignore[arg-type]


def test_the_norm_rounds_where_gemma_does() -> None:
    """The norm agrees bit for bit in bf16: neither 1 + weight nor the normed value before the gain is rounded."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=64,
        num_attention_heads=1,
        normalization="RMSNorm",
        layernorm_zero_centered_gamma=True,
        params_dtype=torch.bfloat16,
    )
    ours, theirs = RMSNorm(config, 64, 1e-6), Gemma3RMSNorm(64).to(torch.bfloat16)
    torch.manual_seed(1)
    ours.weight.data = theirs.weight.data = torch.randn(64).to(torch.bfloat16) * 0.3
    x_NH = torch.randn(50, 64).to(torch.bfloat16)
    assert torch.equal(ours(x_NH), theirs(x_NH))
