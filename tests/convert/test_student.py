"""The layers that a student keeps, and the folder that is written for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_fdd import convert
from megatron_fdd.convert.hf_folder import HfFolder
from tests.convert import toys


def test_fifteen_of_thirty() -> None:
    expected = [0, 1, 2, 3, 6, 9, 12, 15, 17, 20, 23, 26, 27, 28, 29]
    assert convert.choose_layers(15, 30) == expected


@pytest.mark.parametrize("teacher_layers", [1, 2, 7, 8, 9, 24, 33, 80])
def test_every_choice_increases_and_keeps_the_ends(teacher_layers: int) -> None:
    for num_layers in range(1, teacher_layers + 1):
        layers = convert.choose_layers(num_layers, teacher_layers)
        assert len(layers) == num_layers
        assert layers == sorted(set(layers))
        assert layers[0] == 0
        assert layers[-1] < teacher_layers
        if num_layers >= 8:
            assert layers[:4] == [0, 1, 2, 3]
            assert layers[-4:] == list(range(teacher_layers - 4, teacher_layers))
        elif num_layers > 1:
            assert layers[-1] == teacher_layers - 1


@pytest.mark.parametrize("num_layers", [0, 31])
def test_impossible_depths(num_layers: int) -> None:
    with pytest.raises(ValueError, match="between 1 and the teacher's 30"):
        convert.choose_layers(num_layers, 30)


def test_layer_lists() -> None:
    assert convert.parse_layers("0-3, 6,9,26-29", 30) == [0, 1, 2, 3, 6, 9, 26, 27, 28, 29]
    for text, message in {
        "0,x": "'x'",
        "3,3": "increase",
        "4-2": "'4-2' is neither",
        "": "neither",
        "1-": "'1-'",
        "28-30": "28-30 must lie within the teacher's 0-29",
        "0-9999999999": "0-9999999999 must lie",  # a list of these numbers would fill the memory
    }.items():
        with pytest.raises(ValueError, match=message):
            convert.parse_layers(text, 30)


@pytest.mark.parametrize("variant", ["plain", "tied"])
def test_a_student_is_the_chosen_layers(tmp_path: Path, variant: str) -> None:
    teacher = toys.make_llama(tmp_path / "teacher", variant, layer_types=["full_attention"] * 3)
    parameters = convert.init_student(teacher, [0, 2], tmp_path / "student", max_shard_size="30KB")
    before, after = toys.tensor_hashes(teacher), toys.tensor_hashes(tmp_path / "student")
    kept = {
        name.replace("layers.2.", "layers.1."): value for name, value in before.items() if ".1." not in name
    }
    assert after == kept
    source = HfFolder(tmp_path / "student")
    assert parameters == sum(torch.Size(source.shape(name)).numel() for name in source.tensors)
    changed = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
    assert source.config == {**HfFolder(teacher).config, **changed}
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "student" / name).read_bytes() == (teacher / name).read_bytes()
    assert toys.hf_logits(tmp_path / "student", toys.TOKENS).isfinite().all()


@pytest.mark.parametrize("variant", ["qwen2_window", "qwen3_types", "mixtral", "qwen3_moe_mixed"])
def test_a_student_of_layers_that_differ(tmp_path: Path, variant: str) -> None:
    """The middle layer is the one without experts, or the one with another window."""
    teacher = toys.make_llama(tmp_path / "teacher", variant)
    convert.init_student(teacher, [1, 2], tmp_path / "student")
    config = toys.read_json(tmp_path / "student" / "config.json")
    assert config["num_hidden_layers"] == 2
    assert config.get("layer_types") in (None, ["full_attention", "sliding_attention"])
    assert config.get("mlp_only_layers") in (None, [0])
    before, after = toys.tensor_hashes(teacher), toys.tensor_hashes(tmp_path / "student")
    moved = {f"model.layers.{old}.": f"model.layers.{old - 1}." for old in (1, 2)}
    expected = {
        name.replace(old, new): value
        for name, value in before.items()
        for old, new in (
            moved | {"model.embed": "model.embed", "model.norm": "model.norm", "lm_": "lm_"}
        ).items()
        if name.startswith(old)
    }
    assert after == expected
    assert toys.hf_logits(tmp_path / "student", toys.TOKENS).isfinite().all()


UNEVEN = [
    *("qwen2_window", "qwen3_types", "gemma3_text", "exaone4", "olmo3", "cohere2", "smollm3", "llama4_text"),
    *("gpt_oss", "glm4_moe", "deepseek_v3", "qwen3_moe_mixed", "qwen2_moe", "ernie4_5_moe"),
]


@pytest.mark.parametrize(
    ("variant", "layers"),
    [
        *((variant, layers) for variant in UNEVEN for layers in ([1, 2], [0, 2])),
        # None of these has a window, and transformers needs its size.
        *((variant, [1]) for variant in ("gemma2", "gpt_oss", "qwen3_types")),
        *((variant, [2]) for variant in ("cohere2", "exaone4", "gemma3_text", "olmo3", "qwen2_window")),
    ],
)
def test_layers_stay_what_they_are(tmp_path: Path, variant: str, layers: list[int]) -> None:
    """Windows, rotation and experts: the student is transformers' model of the teacher without the other layers."""
    from transformers import AutoModelForCausalLM

    teacher = toys.make_llama(tmp_path / "teacher", variant, tokenizer=False)
    convert.init_student(teacher, layers, tmp_path / "student")
    model = AutoModelForCausalLM.from_pretrained(
        teacher, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    model.model.layers = torch.nn.ModuleList(model.model.layers[layer] for layer in layers)
    kinds = getattr(model.config, "layer_types", None)
    if kinds is not None:
        model.config.layer_types = [kinds[layer] for layer in layers]
    model.config.num_hidden_layers = len(layers)
    with torch.no_grad():
        expected = model(toys.TOKENS, use_cache=False).logits
    got = toys.hf_logits(tmp_path / "student", toys.TOKENS)
    assert (got - expected).abs().max() < 1e-5


def test_a_layer_that_the_teacher_lacks(tmp_path: Path) -> None:
    teacher = toys.make_llama(tmp_path / "teacher", tokenizer=False)
    assert convert.count_layers(teacher) == 3
    with pytest.raises(ValueError, match=r"^layer 3: .* has the layers 0 to 2; choose"):
        convert.init_student(teacher, [0, *range(3, 99)], tmp_path / "student")
    assert not (tmp_path / "student").exists()


def test_a_damaged_teacher_is_no_start(tmp_path: Path) -> None:
    teacher = toys.make_llama(tmp_path / "teacher", tokenizer=False)
    convert.init_student(teacher, [0, 1, 2], tmp_path / "copy")
    path = tmp_path / "copy" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][7] += 1
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"model.norm.weight is not what checksums.json says"):
        convert.init_student(tmp_path / "copy", [0, 2], tmp_path / "student")
    assert not (tmp_path / "student").exists()
