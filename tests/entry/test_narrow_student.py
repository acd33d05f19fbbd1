"""Students that were cut out of their teacher, narrower or dense, learn from it."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from megatron_fdd import convert
from tests.convert import toys
from tests.entry.command import read_metrics, trained
from tests.entry.conftest import Toys
from tests.harness.ranks import Layout, run_on_ranks

SIZES = {"hidden_size": 36, "ffn_hidden_size": 40, "num_attention_heads": 6, "num_query_groups": 3}


def _import(folder: Path, save: Path) -> None:
    convert.hf_to_mcore(folder, save)


def test_a_cut_student_learns(toy: Toys, tmp_path: Path) -> None:
    """Its layers are compared with those that they came from, through the lens of each width."""
    plan = convert.StudentPlan.of(toy.root / "teacher-hf", [0, 1, 3, 5], SIZES)
    parts = {key: count for probe in plan.probes for key, count in probe.keys.items()}
    plan.write(tmp_path / "hf", {key: torch.arange(count) % 7 + 1.0 for key, count in parts.items()})
    run_on_ranks(_import, Layout(ranks=1), {"folder": tmp_path / "hf", "save": tmp_path / "student"})
    metrics = tmp_path / "metrics.jsonl"
    pairs = "--fdd-layer-pairs", "2:2,3:4"
    trained(
        toy.command("--load", tmp_path / "student", "--finetune", "--fdd-metrics-file", metrics, *pairs),
        ranks=1,
    )
    records = [record for record in read_metrics(metrics) if "total" in record]
    assert len(records) == 3
    assert {"trajectory s2:t2", "trajectory s3:t4"} <= records[0].keys()
    assert records[-1]["total"] < records[0]["total"]


def test_a_dense_student_learns(toy: Toys, tmp_path: Path) -> None:
    """It is of its teacher's type, whose config says that no layer has experts."""
    teacher, student = tmp_path / "teacher-hf", tmp_path / "student-hf"
    toys.make_llama(teacher, "glm4_moe", num_hidden_layers=4, torch_dtype="float32")
    plan = convert.DensePlan.of(teacher, range(4), 66)
    plan.write(student, plan.fit(AutoModelForCausalLM.from_pretrained(teacher), toys.TOKENS))
    for folder in (teacher, student):
        save = tmp_path / folder.name.removesuffix("-hf")
        run_on_ranks(_import, Layout(ranks=1), {"folder": folder, "save": save})
    metrics = tmp_path / "metrics.jsonl"
    models = "--load", tmp_path / "student", "--teacher-load", tmp_path / "teacher"
    trained(toy.command(*models, "--finetune", "--fdd-metrics-file", metrics), ranks=1)
    totals = [record["total"] for record in read_metrics(metrics) if "total" in record]
    assert len(totals) == 3
    assert totals[-1] < totals[0]
