"""Dense students of mixtures of experts: the channels of their MLPs, the fitted matrix, what stays, what is refused."""

from __future__ import annotations

import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM

from megatron_fdd import convert
from megatron_fdd.convert import dense_fit
from megatron_fdd.convert.dense_student import DensePlan, FittedMlp
from megatron_fdd.convert.hf_folder import HfFolder
from tests.convert import mcore, toys
from tests.harness.ranks import distributed

TEXT = torch.randint(0, toys.SHAPE["vocab_size"], (12, 40), generator=torch.Generator().manual_seed(5))
# By variant: how its config says that there is one expert; where a router takes two, there are two that are alike.
ONE: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 1, "num_experts_per_tok": 1, "rope_theta": ..., "rms_norm_eps": ...},
    "mixtral_window": {"num_local_experts": 1, "num_experts_per_tok": 1},
    "qwen3_moe": {"num_experts": 1, "num_experts_per_tok": 1, "rope_theta": ...},
    "qwen3_moe_mixed": {"num_local_experts": 1, "num_experts_per_tok": 1},
    "qwen2_moe": {"num_experts": 1, "num_experts_per_tok": 1},
    "granitemoe": {"num_local_experts": 1, "num_experts_per_tok": 1},
    "ernie4_5_moe": {"moe_num_experts": 1, "moe_k": 1},
    "glm4_moe": {"n_routed_experts": 2, "num_experts_per_tok": 2},
    "deepseek_v3_short": {"n_routed_experts": 2, "num_experts_per_tok": 2},
    "deepseek_v2": {"n_routed_experts": 1, "num_experts_per_tok": 1},
}


def make_student(
    teacher: Path, student: Path, width: int, layers: list[int] | None = None
) -> dict[int, FittedMlp]:
    """Make a dense student, fitted to `TEXT`; return its MLPs."""
    plan = DensePlan.of(teacher, layers or [0, 1, 2], width)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    mlps = plan.fit(model, TEXT)
    plan.write(student, mlps)
    return mlps


def load(folder: Path) -> dict[str, Tensor]:
    """Return the weights of transformers' model of a folder, which holds them and no others."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    state: dict[str, Tensor] = model.state_dict()
    return state


def all_channels(config: dict[str, Any]) -> int:
    """Return how many channels the experts of a config have, shared ones among them."""
    width = config.get("moe_intermediate_size", config["intermediate_size"])
    shared = config.get("n_shared_experts", config.get("moe_num_shared_experts", 0)) * width
    return width * config.get("n_routed_experts", 1) + config.get("shared_expert_intermediate_size", shared)


@pytest.mark.parametrize("variant", ONE)
def test_one_expert_is_an_mlp(tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All else in the dense model computes what it does in the mixture: the logits are the same."""
    monkeypatch.setattr(dense_fit, "_RIDGE", 1e-9)
    width = all_channels(toys.llama_config(variant, **ONE[variant]))
    sizes = {**ONE[variant], "intermediate_size": width, "torch_dtype": "float32"}
    teacher = toys.make_llama(tmp_path / "teacher", variant, tokenizer=False, **sizes)
    tensors = load_file(teacher / "model.safetensors")
    for name in tensors:
        if name.endswith("shared_expert_gate.weight"):
            tensors[name] *= 0  # a gate that changes is no MLP's
        if ".experts.1." in name:
            tensors[name] = tensors[name.replace(".experts.1.", ".experts.0.")].clone()
    save_file(tensors, teacher / "model.safetensors", {"format": "pt"})
    make_student(teacher, tmp_path / "student", width)
    load(tmp_path / "student")
    expected, got = (toys.hf_logits(folder, TEXT[:2]) for folder in (teacher, tmp_path / "student"))
    assert expected.std() > 0.3
    assert (got - expected).abs().max() < 1e-3


def by_hand(teacher: Path, layer: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choose and fit one layer in float64, token by token; return gate, up, down and the numbers of the channels."""
    model = AutoModelForCausalLM.from_pretrained(
        teacher, dtype=torch.float64, experts_implementation="eager"
    ).eval()
    block = next(
        module for name, module in model.model.layers[layer].named_children() if hasattr(module, "experts")
    )
    seen: list[tuple[Any, ...]] = []
    block.register_forward_hook(lambda _m, inputs, output: seen.append((inputs[0], output)))
    block.experts.register_forward_pre_hook(
        lambda _m, inputs, keywords: seen.append((*inputs, *keywords.values())), with_kwargs=True
    )
    with torch.no_grad():
        for window in TEXT:
            model(window[None])
        gate, up = block.experts.gate_up_proj.chunk(2, dim=1)
        down = block.experts.down_proj.transpose(1, 2)
        score = torch.zeros(gate.shape[:2], dtype=torch.float64)
        for hidden, chosen, weights in seen[0::2]:
            for token, experts in enumerate(chosen):
                for place, expert in enumerate(experts):
                    activation = silu(gate[expert] @ hidden[token]) * (up[expert] @ hidden[token])
                    score[expert] += (activation * weights[token, place]).square()
        score *= down.square().sum(-1)
        gates, ups, scores = gate.flatten(0, 1), up.flatten(0, 1), score.flatten()
        shared = getattr(block, "shared_expert", None)
        if shared is not None:
            gates = torch.cat([shared.gate_proj.weight, gates])
            ups = torch.cat([shared.up_proj.weight, ups])
            scores = torch.cat([torch.full((len(shared.up_proj.weight),), torch.inf), scores])
        kept = scores.topk(width).indices.sort().values
        x = torch.cat([pair[0].flatten(0, 1) for pair in seen[1::2]])
        y = torch.cat([pair[1].reshape(len(x) // len(TEXT), -1) for pair in seen[1::2]])
        a = silu(x @ gates[kept].T) * (x @ ups[kept].T)
        ridge = (0.1 * width / TEXT.numel() * a.square().sum(0).mean()).sqrt() * torch.eye(width)
        solution = torch.linalg.lstsq(torch.cat([a, ridge]), torch.cat([y, torch.zeros(width, y.shape[1])]))
    return gates[kept], ups[kept], solution.solution.T, kept


@pytest.mark.parametrize(("variant", "width"), [("qwen3_moe", 40), ("qwen2_moe", 60), ("granitemoe", 30)])
def test_chosen_and_fitted_as_by_hand(tmp_path: Path, variant: str, width: int) -> None:
    every = {"decoder_sparse_step": 1} if variant == "qwen2_moe" else {}
    teacher = toys.make_llama(tmp_path / "teacher", variant, tokenizer=False, **every)
    mlps = make_student(teacher, tmp_path / "student", width, [0, 2])
    state = load(tmp_path / "student")
    for place, layer in enumerate([0, 2]):
        gate, up, down, kept = by_hand(teacher, layer, width)
        assert mlps[layer].channels.tolist() == kept.tolist()
        mlp = {part: state[f"model.layers.{place}.mlp.{part}_proj.weight"] for part in ("gate", "up", "down")}
        assert torch.equal(mlp["gate"], gate.float())
        assert torch.equal(mlp["up"], up.float())
        assert (mlp["down"] - down).abs().max() < 1e-3 * down.abs().max()


UNTOUCHED = [
    ("qwen3_moe", 40),
    ("mixtral_window", 50),
    ("qwen2_moe", 66),
    ("ernie4_5_moe", 66),
    ("glm4_moe", 66),
]


@pytest.mark.parametrize(("variant", "width"), UNTOUCHED)
def test_all_but_the_mlps_is_the_teachers(tmp_path: Path, variant: str, width: int) -> None:
    """Bit for bit, the MLPs of layers without experts too; and the other files."""
    teacher = toys.make_llama(tmp_path / "teacher", variant, tie_word_embeddings=True)
    make_student(teacher, tmp_path / "student", width)
    before, after = toys.tensor_hashes(teacher), toys.tensor_hashes(tmp_path / "student")
    mlp = re.compile(r"\.(mlp|block_sparse_moe)\.")
    dense = {name for name in before if mlp.search(name) and name.endswith("mlp.down_proj.weight")}
    assert len(dense) == {"qwen2_moe": 2, "ernie4_5_moe": 1, "glm4_moe": 1}.get(variant, 0)
    kept = {name for name in before if not mlp.search(name)}
    kept |= {name.replace("down", part) for name in dense for part in ("gate", "up", "down")}
    assert {name: after.pop(name) for name in kept} == {name: before[name] for name in kept}
    assert len(after) == 3 * (3 - len(dense))
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "student" / name).read_bytes() == (teacher / name).read_bytes()


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_in_two_tensors_a_layer(tmp_path: Path, transposed: bool) -> None:
    """A folder that holds them as transformers 5 does in memory gives the same student."""
    teacher = toys.make_llama(tmp_path / "teacher", "qwen3_moe", tokenizer=False)
    joined = toys.join_experts(teacher, tmp_path / "joined", transposed=transposed)
    mlps = make_student(teacher, tmp_path / "student", 40)
    DensePlan.of(joined, [0, 1, 2], 40).write(tmp_path / "again", mlps)
    assert toys.tensor_hashes(tmp_path / "again") == toys.tensor_hashes(tmp_path / "student")


def test_one_expert_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the student is written: the matrices of an FP8 or MXFP4 folder are values in memory, not mapped."""
    teacher = toys.make_llama(tmp_path / "teacher", "qwen3_moe", tokenizer=False)
    mlps = make_student(teacher, tmp_path / "student", 66)
    read, held, most = HfFolder.read, weakref.WeakSet[Any](), []

    def read_a_copy(folder: HfFolder, name: str, dtype: torch.dtype | None = None) -> Tensor:
        value = read(folder, name, dtype).clone()
        if ".experts." in name:
            held.add(value.untyped_storage())
            most.append(len(held))
        return value

    monkeypatch.setattr(HfFolder, "read", read_a_copy)
    DensePlan.of(teacher, [0, 1, 2], 66).write(tmp_path / "again", mlps)
    assert toys.tensor_hashes(tmp_path / "again") == toys.tensor_hashes(tmp_path / "student")
    assert 2 <= max(most) <= 3  # gate and up of one, and the first of the next one


def test_layers_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the sums of all layers do not fit into memory, the text is read for each group of them."""
    teacher = toys.make_llama(tmp_path / "teacher", "qwen3_moe", tokenizer=False)
    at_once = make_student(teacher, tmp_path / "student", 40)
    monkeypatch.setattr(dense_fit, "_MOST_BYTES", 2 * 8 * 40 * (40 + 48))
    in_groups = make_student(teacher, tmp_path / "again", 40)
    for layer, mlp in at_once.items():
        assert torch.equal(mlp.down, in_groups[layer].down)


@pytest.mark.parametrize(
    ("variant", "width"), [("qwen3_moe", 40), ("glm4_moe", 66), ("deepseek_v3_short", 66)]
)
@distributed(tp=1)
def test_megatrons_logits(tmp_path: Path, variant: str, width: int) -> None:
    """An import takes the student, of another type or its teacher's; Megatron's model agrees with transformers'."""
    teacher = toys.make_llama(tmp_path / "teacher", variant)
    make_student(teacher, tmp_path / "student", width)
    convert.hf_to_mcore(tmp_path / "student", tmp_path / "mcore")
    model, _ = mcore.from_own_args(tmp_path / "mcore")
    assert not any("experts" in name for name, _ in model.named_parameters())
    got = mcore.logits(model.float(), toys.TOKENS)[..., :99]
    assert (got - toys.hf_logits(tmp_path / "student", toys.TOKENS)).abs().max() < toys.LOGIT_TOLERANCE


REFUSED = [
    ("plain", 40, "has no experts; make its MLPs narrower with --ffn-hidden-size"),
    ("qwen3_moe", 145, "must lie between 1 and the 144 channels of all experts of a layer"),
    ("qwen3_moe", 0, "must lie between 1 and the 144 channels"),
    (
        "qwen3_moe_mixed",
        40,
        "layer 1 has no experts and an MLP of 66 channels, and all MLPs of a student have one",
    ),
    ("olmoe", 40, "is of the type olmoe: no dense type normalises queries and keys over all heads"),
    ("minimax_m2", 40, "is of the type minimax_m2: no dense type normalises"),
    (
        "gpt_oss",
        40,
        "is of the type gpt_oss: no dense type has attention sinks; keep fewer experts with --num-experts",
    ),
    ("llama4_text", 40, "is of the type llama4_text: its router scales what goes into experts"),
]


@pytest.mark.parametrize(("variant", "width", "message"), REFUSED)
def test_refusals(tmp_path: Path, variant: str, width: int, message: str) -> None:
    teacher = toys.make_llama(tmp_path / "teacher", variant, tokenizer=False)
    with pytest.raises(
        ValueError, match=re.escape(f"--dense-ffn-hidden-size {width}: {teacher}") + f".*{message}"
    ):
        DensePlan.of(teacher, [0, 1, 2], width)


def test_layers_without_experts_alone(tmp_path: Path) -> None:
    teacher = toys.make_llama(tmp_path / "teacher", "qwen3_moe_mixed", tokenizer=False)
    with pytest.raises(ValueError, match="none of the layers that are kept has experts; leave the flag out"):
        DensePlan.of(teacher, [1], 66)


def test_damaged_experts(tmp_path: Path) -> None:
    """A router's weight of NaN or an overflow is refused before anything is written."""
    teacher = toys.make_llama(tmp_path / "teacher", "qwen3_moe", tokenizer=False)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    model.model.layers[1].mlp.experts.gate_up_proj.data[0] = torch.inf
    with pytest.raises(ValueError, match="activations of the experts of layer 1 are not finite"):
        DensePlan.of(teacher, [0, 1, 2], 40).fit(model, TEXT)
