"""The completion of `--use-checkpoint-args`: student and teacher are the models that their checkpoints describe."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import unwrap_model
from megatron.training import training

from megatron_fdd import distill
from tests.entry.command import call_main, read_metrics
from tests.entry.conftest import SCRATCH, Toys
from tests.harness.ranks import Layout, clean_megatron, run_on_ranks

# Flags without an entry in `load_args_from_checkpoint` of 0.19.2, and the factor that `gpt_config_from_args` ignores.
FORGOTTEN = "--qk-layernorm --norm-epsilon 2e-4 --use-rope-scaling --rope-scaling-factor 16".split()
FORGOTTEN += ["--rotary-base", "600000"]

ONE_STEP = "--train-iters 1 --save-interval 1".split()


def facts(model: GPTModel) -> dict[str, Any]:
    return {
        "epsilon": model.config.layernorm_epsilon,
        "epsilon of a norm": model.decoder.layers[0].input_layernorm.eps,
        "qk_layernorm": model.decoder.layers[0].self_attention.q_layernorm is not None,
        "inv_freq": model.rotary_pos_emb.inv_freq.tolist(),
    }


def built_models(commands: list[list[str]]) -> list[list[dict[str, Any]]]:
    """Return, on one rank, facts about student and teacher in each run."""
    models: list[torch.nn.Module] = []
    build, setup = distill.build_teacher, training.setup_model_and_optimizer

    def watched_build(*arguments: Any) -> torch.nn.Module:
        models.append(build(*arguments))
        return models[-1]

    def watched_setup(*arguments: Any, **keywords: Any) -> Any:
        result = setup(*arguments, **keywords)
        models.append(unwrap_model(result[0][0]))
        return result

    found = []
    for command in commands:
        models.clear()
        with (
            patch.object(distill, "build_teacher", watched_build),
            patch.object(training, "setup_model_and_optimizer", watched_setup),
        ):
            ending = call_main(command)
        assert ending.status == 0, ending.err
        found.append([facts(model) for model in models])
        clean_megatron()
    return found


def test_nothing_of_the_architecture_is_forgotten(toy: Toys, tmp_path: Path) -> None:
    saved, path = tmp_path / "saved", tmp_path / "metrics.jsonl"
    words = [
        word for word in toy.command("--fdd-alpha", 0, "--fdd-beta", 0) if word != "--use-checkpoint-args"
    ]
    # `--load` names the folder to save to, which is still empty: the run starts from scratch.
    make = [*words, *SCRATCH, *FORGOTTEN, "--load", str(saved), "--save", str(saved), *ONE_STEP]
    use = toy.command(
        "--load", saved, "--teacher-load", saved, "--finetune", *ONE_STEP, "--fdd-metrics-file", path
    )
    [[[_, made], used]] = run_on_ranks(built_models, Layout(ranks=1), {"commands": [make, use]})
    assert made["qk_layernorm"]
    assert made["epsilon"] == made["epsilon of a norm"] == 2e-4
    plain = 600000 ** -(torch.arange(0, 8, 2) / 8)
    # Llama 3 divides the slowest frequency by the factor.
    assert made["inv_freq"][-1] == pytest.approx(float(plain[-1]) / 16, rel=1e-5)
    assert len(used) == 2
    assert used == [made, made]
    [record] = read_metrics(path)
    # Before its first step, the student equals its teacher.
    assert [record[name] for name in ("kd", "trajectory", "delta")] == pytest.approx([0, 0, 0], abs=1e-6)
