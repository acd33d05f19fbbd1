"""GPT-2 as teacher and student: learned positions, a final LayerNorm with a bias in the lens, both kinds of GELU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_fdd import convert
from megatron_fdd.step.lens import read_lens
from tests.convert import mcore, toy_gpt2, toys
from tests.entry.checks import assert_refused
from tests.entry.command import read_metrics, run, trained, without_seconds
from tests.entry.conftest import Toys
from tests.entry.first_logits import first_logits
from tests.harness.ranks import Layout, run_on_ranks

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "teacher": ("plain", {"n_layer": 6}),
    "student": ("untied", {"n_layer": 4, "n_embd": 32}),
    "erf": ("erf", {"n_layer": 4, "n_embd": 32}),
}


def _make_models(root: Path) -> None:
    for name, (variant, changes) in MODELS.items():
        toy_gpt2.make_gpt2(root / f"{name}-hf", variant, **changes)
        convert.hf_to_mcore(root / f"{name}-hf", root / name)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a teacher and two students, as Hugging Face models and as Megatron checkpoints; return their folder."""
    root = tmp_path_factory.mktemp("gpt2")
    run_on_ranks(_make_models, Layout(ranks=1), {"root": root})
    return root


def _command(toy: Toys, models: Path, student: str, teacher: str, *more: object) -> list[str]:
    return toy.command("--load", models / student, "--teacher-load", models / teacher, *more)


def test_each_model_keeps_its_own_gelu(toy: Toys, models: Path) -> None:
    """The two forms differ by 2e-3 in these logits."""
    pairs = [("teacher", "erf"), ("erf", "student")]
    commands = [
        _command(toy, models, student, teacher, "--train-iters", 1, "--finetune")
        for teacher, student in pairs
    ]
    [runs] = run_on_ranks(first_logits, Layout(ranks=1), {"commands": commands})
    for names, found in zip(pairs, runs, strict=True):
        for name, logits in zip(names, found, strict=True):
            expected = toys.hf_logits(models / f"{name}-hf", toys.TOKENS)
            assert (logits[..., :99] - expected).abs().max() < toys.LOGIT_TOLERANCE, name


def test_a_student_is_its_own_teacher(toy: Toys, models: Path, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    command = _command(toy, models, "teacher", "teacher", "--train-iters", 1, "--fdd-metrics-file", path)
    trained(command, ranks=1)
    [record] = read_metrics(path)
    assert [record[term] for term in ("kd", "trajectory", "delta")] == pytest.approx([0, 0, 0], abs=1e-6)


def test_the_other_gelu_is_refused(toy: Toys, models: Path) -> None:
    [ending] = run(_command(toy, models, "student", "teacher", "--no-bias-gelu-fusion"), ranks=1)[0]
    assert_refused([ending], r"bias_gelu_fusion is False here and True there")


def _lens_logits(load: Path, layer: int) -> torch.Tensor:
    """Return, on one rank, the lens on the output of one layer, [B, S, V]."""
    model, _ = mcore.from_own_args(load)
    length = toys.TOKENS.shape[1]
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    with torch.no_grad():
        _, taps = model.eval()(
            toys.TOKENS,
            torch.arange(length)[None].expand_as(toys.TOKENS),
            mask,
            extra_block_kwargs={"extract_layer_indices": {layer}},
            output_processor=lambda *, hidden_states, **_: hidden_states,
        )
        lens = read_lens(model, with_norm=True, detached=True)
        logits = lens.features(taps[0]) @ lens.head_WH.T
    return logits.unflatten(0, (length, -1)).transpose(0, 1)[..., :99]


def test_the_lens_is_transformers_final_norm_and_head(models: Path) -> None:
    arguments = {"load": models / "student", "layer": 1}
    [found] = run_on_ranks(_lens_logits, Layout(tp=1), arguments)
    model = AutoModelForCausalLM.from_pretrained(models / "student-hf", attn_implementation="eager")
    with torch.no_grad():
        after_two = model.transformer(toys.TOKENS, output_hidden_states=True).hidden_states[2]
        expected = model.lm_head(model.transformer.ln_f(after_two))
    assert (found - expected).abs().max() < toys.LOGIT_TOLERANCE


LIVE = "--fdd-lens-head live"
LAYOUTS = {
    "tp2-sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "pp2-live": (2, f"--pipeline-model-parallel-size 2 {LIVE}"),
    "cp2": (2, "--context-parallel-size 2"),
    "recompute": (1, "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
    "tp2-pp2-sp-live": (
        4,
        f"--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel {LIVE}",
    ),
}


@pytest.fixture(scope="module")
def one_rank(toy: Toys, models: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the metrics of two runs on one rank: with a detached lens, and with a live one."""
    flags = {"": (), LIVE: LIVE.split()}
    paths = {name: models / f"metrics{len(words)}.jsonl" for name, words in flags.items()}
    commands = [
        _command(toy, models, "student", "teacher", *words, "--fdd-metrics-file", paths[name])
        for name, words in flags.items()
    ]
    trained(*commands, ranks=1)
    return {name: without_seconds(read_metrics(path)) for name, path in paths.items()}


@pytest.mark.tier("all")
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_does_not_matter(
    toy: Toys, models: Path, one_rank: dict[str, Any], name: str, tmp_path: Path
) -> None:
    ranks, flags = LAYOUTS[name]
    path = tmp_path / "metrics.jsonl"
    command = _command(toy, models, "student", "teacher", *flags.split(), "--fdd-metrics-file", path)
    trained(command, ranks=ranks)
    wanted = one_rank[LIVE if LIVE in flags else ""]
    found = without_seconds(read_metrics(path))
    assert len(found) == len(wanted) == 3
    for record, other in zip(found, wanted, strict=True):
        assert record == pytest.approx(other, rel=1e-5, abs=1e-6)


def _own_logits(load: Path) -> torch.Tensor:
    """Return, on one rank, the logits of a checkpoint's model."""
    model, _ = mcore.from_own_args(load, sequence_parallel=False)
    return mcore.logits(model, toys.TOKENS)[..., :99]


@pytest.mark.parametrize("name", ["student", "erf"])
def test_a_trained_student_goes_back(toy: Toys, models: Path, name: str, tmp_path: Path) -> None:
    saved, back = tmp_path / "saved", tmp_path / "back"
    flags = [*LAYOUTS["tp2-sp"][1].split(), "--save", saved, "--save-interval", 3, "--finetune"]
    trained(_command(toy, models, name, "teacher", *flags), ranks=2)
    run_on_ranks(convert.mcore_to_hf, Layout(tp=1), {"load": saved, "hf_out": back})
    [expected] = run_on_ranks(_own_logits, Layout(tp=1), {"load": saved})
    exported = toys.hf_logits(back, toys.TOKENS)
    assert (exported - expected).abs().max() < toys.LOGIT_TOLERANCE
    assert (exported - toys.hf_logits(models / f"{name}-hf", toys.TOKENS)).abs().max() > 0.01
    assert toys.read_json(back / "config.json") == toys.read_json(models / f"{name}-hf" / "config.json")
