"""A family from outside of the package (`examples/extend/family.py`): converted both ways, and a run's two models."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_fdd import convert
from tests.convert import mcore, toys
from tests.entry.checks import assert_refused
from tests.entry.command import Patch, run, trained
from tests.entry.conftest import Toys
from tests.harness.ranks import Layout, distributed, run_on_ranks

CONFIG: dict[str, Any] = {
    "model_type": "hyperclovax",
    "architectures": ["HyperCLOVAXForCausalLM"],
    "attention_multiplier": 0.2,
    "rope_scaling": toys.LLAMA3_SCALING,
}


def _make(folder: Path, num_layers: int) -> None:
    """`folder/source` and `folder/mcore`, where nothing but the example knows the family."""
    importlib.import_module("examples.extend.family")
    if dist.get_rank() == 0:
        toys.make_llama(folder / "source", num_hidden_layers=num_layers, **CONFIG)
    dist.barrier()
    convert.hf_to_mcore(folder / "source", folder / "mcore")


@distributed(tp=2)
def test_both_ways_on_two_ranks(tmp_path: Path) -> None:
    _make(tmp_path, 3)
    model, args = mcore.from_own_args(tmp_path / "mcore")
    assert args.fdd_layer_spec == "hyperclovax"
    expected = toys.hf_logits(tmp_path / "source", toys.TOKENS)
    got = mcore.logits(model, toys.TOKENS)
    assert (got[..., :99] - expected).abs().max() < toys.LOGIT_TOLERANCE
    convert.mcore_to_hf(tmp_path / "mcore", tmp_path / "back")
    assert toys.tensor_hashes(tmp_path / "back") == toys.tensor_hashes(tmp_path / "source")
    assert toys.read_json(tmp_path / "back/config.json") == toys.read_json(tmp_path / "source/config.json")


@pytest.mark.tier("default")
def test_teacher_and_student_of_a_run(toy: Toys, tmp_path: Path) -> None:
    run_on_ranks(_make, Layout(tp=1), {"folder": tmp_path, "num_layers": 4})
    places = ("--load", tmp_path / "mcore", "--teacher-load", tmp_path / "mcore", "--finetune")
    command = toy.command(*places, "--pipeline-model-parallel-size", 2, "--train-iters", 1)
    trained([*command, "--fdd-plugin", "examples.extend.family"])
    # A process in which nobody has added it.
    unknown = [Patch("megatron_fdd.plan.modules", "FAMILIES", {})]
    for flags, whose in (((), "student"), (("--load", toy.student), "teacher")):
        [endings] = run([*command, *map(str, flags)], patches=unknown)
        assert_refused(endings, f"the {whose}'s layers are those of 'hyperclovax'.*no family here has")
