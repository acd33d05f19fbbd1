"""Models of every family shaped like Llama, as teacher and student: they compute what transformers computes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from megatron_fdd import convert
from megatron_fdd.host.role import Role
from megatron_fdd.plan import modules
from megatron_fdd.plan.context import Model
from tests.convert import toys
from tests.entry.checks import assert_refused
from tests.entry.command import read_metrics, run, trained, without_seconds
from tests.entry.conftest import Toys
from tests.entry.first_logits import first_logits
from tests.harness.ranks import Layout, run_on_ranks
from tests.transformer_engine import IMAGE, needs_python

# (teacher, student); a field that only one family sets must reach only the model of that family.
PAIRS = [
    ("qwen3_moe_mixed", "qwen3"),
    ("mixtral", "mistral_window"),
    ("qwen2_window", "mixtral"),
    ("plain", "qwen3_types"),
    ("gemma3_text", "olmo2"),  # layers of their own
    ("olmo2", "gemma3_text"),
    # Shared experts and a router with a bias; sinks, windows by layer and experts with biases; layers without rotation.
    ("glm4_moe", "gpt_oss"),
    ("gpt_oss", "smollm3"),
    ("qwen2_moe", "glm4_moe"),
    ("llama_yarn", "phi3"),  # rotary scaling; a part of each head rotated
    ("nemotron", "starcoder2"),  # no gate, LayerNorm, a rotary base that is no whole number
    ("ernie4_5", "qwen2_linear"),
    ("granite", "cohere2"),  # scaled logits
    ("deepseek_v3_yarn", "deepseek_v2"),  # multi-latent attention
    ("ernie4_5_moe", "hunyuan_v1_dense"),
    ("cohere2", "granitemoe"),
    ("ministral3", "llama4_text"),
    ("olmo2", "gemma2"),  # capped scores and logits
    ("gemma2", "gemma3_text"),
]
DEEPER: dict[str, dict[str, Any]] = {
    "qwen3_types": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "glm4_moe": {"torch_dtype": "float32"},
    "llama4_text": {"no_rope_layers": [1, 1, 0, 1]},
}


def _make_models(root: Path) -> None:
    for name in {name for pair in PAIRS for name in pair}:
        # There are four layers, so that two stages can share them.
        toys.make_llama(root / f"{name}-hf", name, num_hidden_layers=4, **DEEPER.get(name, {}))
        convert.hf_to_mcore(root / f"{name}-hf", root / name)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the models, as Hugging Face models (`NAME-hf`) and as Megatron checkpoints; return their folder."""
    root = tmp_path_factory.mktemp("families")
    run_on_ranks(_make_models, Layout(ranks=1), {"root": root})
    return root


def _command(toy: Toys, models: Path, teacher: str, student: str, *more: object) -> list[str]:
    return toy.command("--load", models / student, "--teacher-load", models / teacher, *more)


@pytest.mark.tier("all")
def test_both_models_of_a_run_are_those_of_transformers(toy: Toys, models: Path) -> None:
    commands = [_command(toy, models, *pair, "--train-iters", 1, "--finetune") for pair in PAIRS]
    [runs] = run_on_ranks(first_logits, Layout(ranks=1), {"commands": commands})
    for names, found in zip(PAIRS, runs, strict=True):
        for name, logits in zip(names, found, strict=True):
            expected = toys.hf_logits(models / f"{name}-hf", toys.TOKENS)
            assert (logits[..., :99] - expected).abs().max() < 2 * toys.LOGIT_TOLERANCE, (names, name)


LAYOUTS = {
    "ep2": ("qwen3_moe_mixed", "qwen3", "--teacher-expert-model-parallel-size 2"),
    "tp2": ("qwen3_moe_mixed", "qwen3", "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2": ("mixtral", "mistral_window", "--pipeline-model-parallel-size 2"),
    "pp2_mixed": ("qwen3_moe_mixed", "qwen3", "--pipeline-model-parallel-size 2"),
    "cp2": ("plain", "qwen3_types", "--context-parallel-size 2"),
    "tp2_own": ("gemma3_text", "olmo2", "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2_own": ("gemma3_text", "olmo2", "--pipeline-model-parallel-size 2"),
    "tp2_gemma": ("olmo2", "gemma3_text", "--tensor-model-parallel-size 2"),
    "vpp2_gemma": (
        "olmo2",
        "gemma3_text",
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    ),
    "pp2_shared": ("qwen2_moe", "glm4_moe", "--pipeline-model-parallel-size 2"),
    "tp2_shared": ("qwen2_moe", "glm4_moe", "--tensor-model-parallel-size 2 --sequence-parallel"),
    "ep2_sinks": (
        "glm4_moe",
        "gpt_oss",
        "--expert-model-parallel-size 2 --teacher-expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall",
    ),
    "pp2_sinks": ("gpt_oss", "smollm3", "--pipeline-model-parallel-size 2"),
    "cp2_yarn": ("llama_yarn", "phi3", "--context-parallel-size 2"),
    "tp2_ungated": ("nemotron", "starcoder2", "--tensor-model-parallel-size 2 --sequence-parallel"),
    "tp2_cohere": ("ernie4_5_moe", "cohere2", "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2_scaled": ("granite", "cohere2", "--pipeline-model-parallel-size 2"),
    "cp2_hunyuan": ("granitemoe", "hunyuan_v1_dense", "--context-parallel-size 2"),
    "tp2_latent": ("deepseek_v3_yarn", "deepseek_v2", "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2_latent": ("deepseek_v3_yarn", "deepseek_v2", "--pipeline-model-parallel-size 2"),
    "cp2_latent": ("deepseek_v3_yarn", "deepseek_v2", "--context-parallel-size 2"),
    "cp2_gemma": ("olmo2", "gemma3_text", "--context-parallel-size 2"),
    "tp2_capped": ("olmo2", "gemma2", "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2_capped": ("gemma2", "gemma3_text", "--pipeline-model-parallel-size 2"),
    "cp2_capped": ("olmo2", "gemma2", "--context-parallel-size 2"),
}


Metrics = dict[tuple[str, str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def on_one_rank(toy: Toys, models: Path) -> Metrics:
    """Return the metrics of each pair in `LAYOUTS`."""
    pairs = {
        (teacher, student): models / f"{teacher}-{student}.jsonl" for teacher, student, _ in LAYOUTS.values()
    }
    commands = [_command(toy, models, *pair, "--fdd-metrics-file", path) for pair, path in pairs.items()]
    trained(*commands, ranks=1)
    return {pair: without_seconds(read_metrics(path)) for pair, path in pairs.items()}


_LATENT = pytest.param("deepseek_v3_yarn", "deepseek_v2", marks=pytest.mark.tier("all"))
# Mechanisms that other tests show at this layout.
_COVERED = {
    name
    for name in LAYOUTS
    if name.endswith(("shared", "sinks", "yarn", "ungated", "latent", "cohere", "hunyuan"))
} - {"ep2_sinks"}


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=pytest.mark.tier("all") if name in _COVERED else ()) for name in LAYOUTS],
)
def test_every_layout_trains_alike(
    toy: Toys, models: Path, on_one_rank: Metrics, tmp_path: Path, layout: str
) -> None:
    teacher, student, flags = LAYOUTS[layout]
    path = tmp_path / "metrics.jsonl"
    trained(_command(toy, models, teacher, student, *flags.split(), "--fdd-metrics-file", path), ranks=2)
    _assert_alike(path, on_one_rank[teacher, student])


@pytest.mark.tier("all")
@needs_python
@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        ("qwen3_moe_mixed", "qwen3"),
        ("gemma3_text", "olmo2"),
        ("olmo2", "gemma3_text"),
        ("ernie4_5_moe", "cohere2"),
        ("granitemoe", "hunyuan_v1_dense"),
        _LATENT,
    ],
)
def test_modules_of_transformer_engine_train_alike(
    toy: Toys, models: Path, on_one_rank: Metrics, tmp_path: Path, teacher: str, student: str
) -> None:
    """Norms that are modules of their own, and layers of a family's own, over its kernels for CPUs."""
    path = tmp_path / "metrics.jsonl"
    flags = ["--transformer-impl", "transformer_engine", *LAYOUTS["tp2"][-1].split()]
    command = _command(toy, models, teacher, student, *flags, "--fdd-metrics-file", path)
    trained(command, ranks=2, image=IMAGE)
    _assert_alike(path, on_one_rank[teacher, student])


def _assert_alike(path: Path, expected: list[dict[str, Any]]) -> None:
    records = without_seconds(read_metrics(path))
    assert len(records) > 0
    for alone, shared in zip(expected, records, strict=True):
        for term in ("kd", "trajectory", "delta"):
            assert shared[term] == pytest.approx(alone[term], rel=1e-4), term


@pytest.mark.parametrize(
    ("teacher", "student"), [("mixtral", "mistral_window"), ("olmo2", "gemma3_text"), _LATENT]
)
def test_a_trained_student_goes_back(
    toy: Toys, models: Path, tmp_path: Path, teacher: str, student: str
) -> None:
    save = tmp_path / "save"
    flags = ("--save", save, "--save-interval", 2, "--train-iters", 2, "--lr", 1e-2)
    command = _command(toy, models, teacher, student, *flags)
    command[command.index("--load")] = "--pretrained-checkpoint"
    trained(command, ranks=2)
    back = tmp_path / "back"
    [exported] = run_on_ranks(convert.mcore_to_hf, Layout(ranks=1), {"load": save, "hf_out": back})
    assert exported.num_tensors == len(toys.tensor_hashes(models / f"{student}-hf"))
    assert exported.unchanged < exported.num_tensors
    assert toys.read_json(back / "config.json") == toys.read_json(models / f"{student}-hf" / "config.json")
    change = toys.hf_logits(back, toys.TOKENS) - toys.hf_logits(models / f"{student}-hf", toys.TOKENS)
    assert 0.01 < change.abs().max() < 10


@pytest.mark.parametrize("flag", ["masked_softmax_fusion", "reset_attention_mask"])
def test_windows_that_local_attention_would_forget(flag: str) -> None:
    switches = {name: name == flag for name in ("masked_softmax_fusion", "reset_attention_mask")}
    args = argparse.Namespace(window_size=(6, 0), transformer_impl="local", **switches)
    args.context_parallel_size, args.dataloader_inter_document_masking = 1, False
    modules.check_local_attention(_student(args))  # the rehearsal's attention supports both
    with patch.object(modules, "is_rehearsal_wanted", return_value=False):
        with pytest.raises(ValueError, match=f"the student has sliding windows.*{flag.replace('_', '-')}"):
            modules.check_local_attention(_student(args))
        for harmless in ({"window_size": None}, {"transformer_impl": "transformer_engine"}, {flag: False}):
            modules.check_local_attention(_student(argparse.Namespace(**{**vars(args), **harmless})))


def _student(args: argparse.Namespace) -> Model:
    return Model(Role.STUDENT, args, None)


def test_flags_against_a_checkpoint_with_windows(toy: Toys, models: Path) -> None:
    command = _command(toy, models, "mixtral", "mistral_window", "--window-size", "3,0")
    [ending] = run(command, ranks=1)[0]
    assert_refused([ending], r"window_size is \(3, 0\) here and \(6, 0\) there")
