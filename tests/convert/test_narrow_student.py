"""Narrower students: which channels and heads they keep, that these are the teacher's, what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_fdd import convert
from tests.convert import mcore, toy_gpt2, toys
from tests.convert.narrowing import Narrowing, state_of
from tests.harness.ranks import distributed

ALL = {"hidden_size": 36, "ffn_hidden_size": 40, "num_attention_heads": 6, "num_query_groups": 3}
HIDDEN, FFN = {"hidden_size": 36}, {"ffn_hidden_size": 40}
EXPERTS = {"num_experts": 3, "moe_ffn_hidden_size": 16}


def make_student(teacher: Path, student: Path, sizes: dict[str, int], layers: list[int]) -> dict[str, Tensor]:
    """Make a student by random scores, and return them."""
    plan = convert.StudentPlan.of(teacher, layers, sizes)
    generator = torch.Generator().manual_seed(3)
    parts = {key: count for probe in plan.probes for key, count in probe.keys.items()}
    scores = {
        key: torch.rand(count, generator=generator, dtype=torch.float64) for key, count in parts.items()
    }
    plan.write(student, scores)
    return scores


def check(teacher: Path, student: Path, sizes: dict[str, int], attention: tuple[int, int, int]) -> None:
    """Compare a student with transformers' model of the teacher, indexed; its second layer is the teacher's third."""
    scores = make_student(teacher, student, sizes, [0, 2])
    narrowing = Narrowing(
        scores, *attention, sizes, transposed="gpt_oss" in (teacher / "config.json").read_text()
    )
    expected = {
        re.sub(r"\.2\.", ".1.", name): narrowing.cut(name, value)
        for name, value in state_of(teacher).items()
        if not re.search(r"(layers|h)\.1\.", name)
    }
    found = state_of(student)
    assert found.keys() == expected.keys()
    different = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert different == []


CASES: list[tuple[str, dict[str, int]]] = [
    *(
        (variant, ALL)
        for variant in ("plain", "tied", "biases", "attention_bias", "qwen2", "qwen3_types", "phi3")
    ),
    *(
        (variant, ALL)
        for variant in ("nemotron", "bfloat16", "mistral_window", "seed_oss", "granite", "glm4", "cohere2")
    ),
    ("ungrouped", {"num_attention_heads": 6, "num_query_groups": 6, **HIDDEN}),
    ("plain", {"num_attention_heads": 6}),
    ("gemma3_text", {"ffn_hidden_size": 40, "num_attention_heads": 6}),
    *((variant, HIDDEN | FFN) for variant in ("olmo2", "olmo3", "exaone4", "deepseek_v3_dense")),
    ("starcoder2", {"num_attention_heads": 6, **HIDDEN}),
    *(
        (variant, EXPERTS | HIDDEN)
        for variant in ("mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "minimax_m2")
    ),
    *((variant, EXPERTS) for variant in ("qwen3_moe_mixed", "olmoe", "ernie4_5_moe")),
    ("glm4_moe", {"num_experts": 4, "moe_shared_expert_intermediate_size": 24, **ALL}),
    ("deepseek_v3_short", {"num_experts": 4, **HIDDEN}),
]


@pytest.mark.parametrize(("variant", "sizes"), CASES, ids=[f"{name}-{len(sizes)}" for name, sizes in CASES])
def test_a_student_is_the_teachers_model_indexed(tmp_path: Path, variant: str, sizes: dict[str, int]) -> None:
    config = toys.llama_config(variant)
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    width = config.get("head_dim", config["hidden_size"] // heads)
    toys.make_llama(tmp_path / "teacher", variant, tokenizer=False)
    check(tmp_path / "teacher", tmp_path / "student", sizes, (heads, groups, width))


@pytest.mark.parametrize("sizes", [{"num_attention_heads": 3, **HIDDEN, "ffn_hidden_size": 40}, FFN])
def test_gpt2(tmp_path: Path, sizes: dict[str, int]) -> None:
    toy_gpt2.make_gpt2(tmp_path / "teacher")
    check(tmp_path / "teacher", tmp_path / "student", sizes, (4, 4, 12))


def test_a_wrong_channel_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison fails where query rows, or gate and up, are cut at places that are off by one."""
    from megatron_fdd.convert.kept_parts import KeptParts
    from megatron_fdd.convert.parameter_axes import Axis

    toys.make_llama(tmp_path / "teacher", tokenizer=False)
    along = KeptParts.along
    for number, mutated in enumerate((Axis.QKV, Axis.HEADS, Axis.GATED_FFN, Axis.FFN, Axis.HIDDEN)):

        def off_by_one(self: KeptParts, axis: Axis, parameter: str, size: int, broken: Axis = mutated) -> Any:
            kept = along(self, axis, parameter, size)
            return (kept + 1) % size if axis is broken and kept is not None else kept

        monkeypatch.setattr(KeptParts, "along", off_by_one)
        with pytest.raises(AssertionError):
            check(tmp_path / "teacher", tmp_path / f"student{number}", ALL, (12, 6, 10))


@pytest.mark.parametrize("variant", ["plain", "biases", "phi3", "starcoder2"])
@distributed(tp=1)
def test_megatrons_logits(tmp_path: Path, variant: str) -> None:
    """An import takes the student, and Megatron's model of it agrees with transformers'."""
    teacher = toys.make_llama(tmp_path / "teacher", variant)
    sizes = {
        name: size for name, size in ALL.items() if variant != "starcoder2" or name != "num_query_groups"
    }
    make_student(teacher, tmp_path / "student", sizes, [0, 2])
    convert.hf_to_mcore(tmp_path / "student", tmp_path / "mcore")
    model, args = mcore.from_own_args(tmp_path / "mcore")
    assert (args.hidden_size, args.ffn_hidden_size, args.num_attention_heads) == (36, 40, 6)
    got = mcore.logits(model.float(), toys.TOKENS)[..., :99]
    assert (got - toys.hf_logits(tmp_path / "student", toys.TOKENS)).abs().max() < toys.LOGIT_TOLERANCE


def score(teacher: Path, sizes: dict[str, int], tokens: Tensor = toys.TOKENS) -> dict[str, Tensor]:
    """Score a teacher's parts on a text."""
    from transformers import AutoModelForCausalLM

    plan = convert.StudentPlan.of(teacher, [0, 1, 2], sizes)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    return convert.measure_importance(model, plan.probes, tokens)


def test_channels_without_effect_go_first(tmp_path: Path) -> None:
    """Channels of MLPs and query groups that are always 0 are cut, and the student says what its teacher says."""
    from transformers import AutoModelForCausalLM

    teacher = toys.make_llama(tmp_path / "teacher", tokenizer=False)
    model = AutoModelForCausalLM.from_pretrained(teacher)
    state = model.state_dict()
    for layer in range(3):
        state[f"model.layers.{layer}.mlp.gate_proj.weight"][layer::3] = 0
        state[f"model.layers.{layer}.self_attn.v_proj.weight"][10 * layer : 10 * layer + 20] = 0
    model.save_pretrained(teacher)
    (teacher / "config.json").write_text(json.dumps(toys.llama_config()))
    sizes = {"ffn_hidden_size": 44, "num_attention_heads": 8, "num_query_groups": 4}
    scores = score(teacher, sizes)
    parameters = convert.StudentPlan.of(teacher, [0, 1, 2], sizes).write(tmp_path / "student", scores)
    assert parameters < sum(value.numel() for value in state.values())
    expected, got = (toys.hf_logits(folder, toys.TOKENS) for folder in (teacher, tmp_path / "student"))
    assert expected.std() > 0.3
    assert (got - expected).abs().max() < 1e-5


def test_a_token_of_zeros(tmp_path: Path) -> None:
    """The row of a padding token is often 0: it is no damage, and tells nothing about channels."""
    teacher = toys.make_llama(tmp_path / "teacher", tokenizer=False)
    tensors = load_file(teacher / "model.safetensors")
    tensors["model.embed_tokens.weight"][0] = 0
    save_file(tensors, teacher / "model.safetensors", {"format": "pt"})
    shares = score(teacher, HIDDEN, torch.zeros(2, 8, dtype=torch.int64))
    first = shares["decoder.layers.0.input_layernorm.weight"]
    assert torch.allclose(first, torch.full_like(first, 1 / 48))


def test_hidden_channels_without_effect_go_first(tmp_path: Path) -> None:
    """Channels that are always 0 are cut, and norms over the others are scaled so that the logits stay."""
    from transformers import AutoModelForCausalLM

    teacher = toys.make_llama(tmp_path / "teacher", tokenizer=False, rms_norm_eps=1e-9)
    model = AutoModelForCausalLM.from_pretrained(teacher)
    for name, value in model.state_dict().items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            value[:, 3::4] = 0
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            value[3::4] = 0
    model.save_pretrained(teacher)
    (teacher / "config.json").write_text(json.dumps(toys.llama_config(rms_norm_eps=1e-9)))
    plan = convert.StudentPlan.of(teacher, [0, 1, 2], HIDDEN | {"num_attention_heads": 12})
    plan.write(tmp_path / "student", score(teacher, HIDDEN))
    expected, got = (toys.hf_logits(folder, toys.TOKENS) for folder in (teacher, tmp_path / "student"))
    assert expected.std() > 0.3
    assert (got - expected).abs().max() < 1e-5


def test_scores_are_those_of_the_definition(tmp_path: Path) -> None:
    """By hand, in float64: outputs of norms, inputs of the matrices behind MLP channels and heads."""
    from transformers import AutoModelForCausalLM

    teacher = toys.make_llama(tmp_path / "teacher", tokenizer=False)
    found = score(teacher, ALL)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64)
    seen: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.register_forward_hook(lambda _m, _i, output, name=name: seen.update({name: output}))
        elif name.endswith(("down_proj", "o_proj")):
            module.register_forward_pre_hook(lambda _m, inputs, name=name: seen.update({name: inputs[0]}))
    with torch.no_grad():
        model(toys.TOKENS)
    by_definition = {name: each.abs().mean(1).square().sum(0).sqrt() for name, each in seen.items()}
    layer = by_definition["model.layers.1.mlp.down_proj"], by_definition["model.layers.1.self_attn.o_proj"]
    hidden = sum(score for name, score in by_definition.items() if name.endswith("norm"))
    assert len(found) == 7 + 7  # and the shares of norms
    for key, expected in {
        "hidden": hidden,
        "decoder.layers.1.mlp": layer[0],
        "decoder.layers.1.self_attention": layer[1],
    }.items():
        torch.testing.assert_close(found[key], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", ["qwen3_moe", "gpt_oss"])
def test_scores_of_experts(tmp_path: Path, variant: str) -> None:
    """By hand: an expert's output is the difference that its weight makes."""
    from transformers import AutoModelForCausalLM

    teacher = toys.make_llama(tmp_path / "teacher", variant, tokenizer=False)
    found = score(teacher, EXPERTS)
    model = AutoModelForCausalLM.from_pretrained(teacher, experts_implementation="eager").eval()
    experts = model.model.layers[1].mlp.experts
    calls: list[tuple[Tensor, ...]] = []
    handle = experts.register_forward_pre_hook(
        lambda _m, args, keywords: calls.append((*args, *keywords.values())), with_kwargs=True
    )
    with torch.no_grad():
        for tokens in toys.TOKENS:
            model(tokens[None])
        handle.remove()
        total = torch.zeros(2, len(experts.gate_up_proj))
        for window, (hidden, chosen, weights) in enumerate(calls):
            for expert in range(total.shape[1]):
                only = experts(hidden, chosen, weights * (chosen == expert))
                total[window, expert] = only.norm(dim=-1).mean()
    key = "decoder.layers.1.mlp.router"
    torch.testing.assert_close(found[key].float(), total.square().sum(0).sqrt(), rtol=1e-4, atol=1e-6)
    last = experts.down_proj
    for channel in (0, 7):  # a channel is scored by its activation, whatever the matrix behind it makes of it
        last.data.zero_()
        last.data[(2, channel, 0) if variant == "gpt_oss" else (2, 0, channel)] = 1.0
        if experts.has_bias:
            experts.down_proj_bias.data.zero_()
        with torch.no_grad():
            ones = [experts(h, c, (c == 2).to(h.dtype))[:, 0].abs().mean() for h, c, _ in calls]
        expected = torch.stack(ones).square().sum().sqrt()
        assert (
            abs(found["decoder.layers.1.mlp.experts.local_experts.2"][channel] - expected) < 1e-4 * expected
        )


def test_experts_are_chosen_within_their_groups(tmp_path: Path) -> None:
    """A router chooses groups first, so that each keeps as many."""
    teacher = toys.make_llama(tmp_path / "teacher", "deepseek_v3", tokenizer=False, n_group=2)
    plan = convert.StudentPlan.of(teacher, [1, 2], {"num_experts": 4})
    scores = {
        f"decoder.layers.{layer}.mlp.router": torch.tensor([9.0, 8, 7, 6, 1, 2, 4, 3]) for layer in (1, 2)
    }
    plan.write(tmp_path / "student", scores)
    before, after = state_of(teacher), state_of(tmp_path / "student")
    kept = before["model.layers.2.mlp.gate.weight"][[0, 1, 6, 7]]
    assert torch.equal(after["model.layers.1.mlp.gate.weight"], kept)
    assert toys.hf_logits(tmp_path / "student", toys.TOKENS).isfinite().all()


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_in_two_tensors_a_layer(tmp_path: Path, transposed: bool) -> None:
    """A folder that holds them as transformers 5 does in memory gives the same student."""
    teacher = toys.make_llama(tmp_path / "teacher", "qwen3_moe", tokenizer=False)
    joined = toys.join_experts(teacher, tmp_path / "joined", transposed=transposed)
    sizes = EXPERTS | HIDDEN
    make_student(teacher, tmp_path / "student", sizes, [0, 2])
    make_student(joined, tmp_path / "again", sizes, [0, 2])
    expected, found = toys.hf_logits(tmp_path / "student", toys.TOKENS), tmp_path / "again"
    if transposed:  # transformers reads the other orientation alone
        tensors = load_file(found / "model.safetensors")
        save_file(
            {name: (each.mT if each.ndim == 3 else each).contiguous() for name, each in tensors.items()},
            found / "model.safetensors",
            {"format": "pt"},
        )
    assert torch.equal(toys.hf_logits(found, toys.TOKENS), expected)


REFUSED = [
    (
        "plain",
        {"hidden_size": 49},
        "--hidden-size 49 must lie between 1 and the teacher's 48 hidden channels",
    ),
    (
        "plain",
        {"ffn_hidden_size": 0},
        "--ffn-hidden-size 0 must lie between 1 and the teacher's 66 channels of an MLP",
    ),
    ("plain", {"hidden_size": 40}, "--hidden-size 40 must be a multiple of the 12 attention heads"),
    ("plain", {"num_attention_heads": 7}, "--num-attention-heads 7 must be a multiple of the 6 query groups"),
    (
        "plain",
        {"num_attention_heads": 9, "num_query_groups": 3},
        "the teacher has 2 heads in each; give fewer heads",
    ),
    (
        "plain",
        {"num_query_groups": 3},
        "--num-query-groups 3: a group has 2 heads; add --num-attention-heads 6, or a smaller multiple",
    ),
    (
        "gemma3_text",
        HIDDEN,
        "gemma3_text multiplies embeddings by its root, which a cut would change; leave it out",
    ),
    ("olmoe", HIDDEN, "olmoe has as many channels of queries as hidden ones"),
    (
        "olmo2",
        {"num_attention_heads": 6},
        "--num-attention-heads: decoder.layers.0.self_attention.q_layernorm.weight is",
    ),
    (
        "deepseek_v3_dense",
        {"num_attention_heads": 2},
        "--num-attention-heads 2: deepseek_v3 has latent attention, whose heads are not cut; leave it out",
    ),
    (
        "deepseek_v3",
        {"moe_ffn_hidden_size": 16},
        "--moe-shared-expert-intermediate-size 24 must be a multiple of the experts' width, 16; give another",
    ),
    ("plain", {"num_experts": 2}, "--num-experts 2: no layer that is kept has such parts; leave it out"),
    (
        "qwen3_moe",
        {"num_experts": 2},
        "--num-experts 2 must lie between 3 and the teacher's 6 experts in a layer",
    ),
    ("deepseek_v3", {"num_experts": 5}, "--num-experts 5 must be a multiple of the 4 groups"),
    ("qwen3_moe", FFN, "--ffn-hidden-size 40: no layer that is kept has such parts"),
]


@pytest.mark.parametrize(("variant", "sizes", "message"), REFUSED)
def test_refusals(tmp_path: Path, variant: str, sizes: dict[str, int], message: str) -> None:
    teacher = toys.make_llama(tmp_path / "teacher", variant, tokenizer=False)
    with pytest.raises(ValueError, match=re.escape(message)):
        convert.StudentPlan.of(teacher, [0, 2], sizes)


def test_gpt2s_heads_fill_the_hidden_size(tmp_path: Path) -> None:
    toy_gpt2.make_gpt2(tmp_path / "teacher")
    with pytest.raises(
        ValueError, match=r"a gpt2 has no config of these sizes .* 4 heads of width 12 on a hidden size of 44"
    ):
        convert.StudentPlan.of(tmp_path / "teacher", [0], {"hidden_size": 44})
