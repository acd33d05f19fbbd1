"""A student of a Gemma 2, whose logits have a soft cap: what is logged is what the models of transformers give."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cosine_similarity, kl_div
from transformers import AutoModelForCausalLM

from benchmarks.tiny_teachers import tiny_model
from megatron_fdd.data.store.segment import segment_names, segment_path
from tests.entry.command import read_metrics, trained
from tests.entry.conftest import Toys

CAP = 2.0
# Ids of the tokenizer; both heads have more rows.
VOCABULARY = 91


def capped_teacher(toy: Toys, folder: Path) -> Path:
    """Make a tiny Gemma 2 with the tokenizer of the toy set, most of whose logits the cap bends."""
    shutil.copytree(toy.root / "teacher-hf", folder)
    (folder / "model.safetensors").unlink()
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    model = tiny_model("gemma2", vocab_size=vocab_size, final_logit_softcapping=CAP)
    model.model.norm.weight.data += 9.0
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits_of_blocks(folder: Path, ids_BS: Tensor, blocks: tuple[int, ...]) -> list[Tensor]:
    """Return log-probabilities [B, S, V] from the outputs of some blocks, and from the last one."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    result = model(input_ids=ids_BS, output_hidden_states=True)
    found = [model.lm_head(model.model.norm(result.hidden_states[block])) for block in blocks]
    if model.config.model_type == "gemma2":
        found = [CAP * torch.tanh(each / CAP) for each in found]
    return [each[..., :VOCABULARY].log_softmax(-1) for each in (*found, result.logits)]


def test_a_student_learns_from_a_teacher_with_a_soft_cap(toy: Toys, tmp_path: Path) -> None:
    teacher, store, metrics = capped_teacher(toy, tmp_path / "gemma2"), tmp_path / "store", tmp_path / "m"
    flags = toy.command("--train-iters", 1, "--fdd-layer-pairs", "1:1,2:3")
    at = flags.index("--teacher-load")
    del flags[at : at + 2]
    own = ("--engine", "transformers", "--teacher", teacher, "--store", store, "--form", "float32")
    _, [run] = trained(
        ["teach", *map(str, own), "--device-map", "cpu", *flags],
        [*flags, "--fdd-teacher-store", str(store), "--fdd-metrics-file", str(metrics)],
        ranks=1,
    )
    [name] = segment_names(store)
    ids_BS = load_file(segment_path(store, name))["ids"].view(-1, 16).long()
    of_teacher = logits_of_blocks(teacher, ids_BS, (1, 3))
    of_student = logits_of_blocks(toy.root / "student-hf", ids_BS, (1, 2))
    wanted = {
        name: kl_div(student, teacher, reduction="none", log_target=True).sum(-1).mean()
        for name, teacher, student in zip(
            ("trajectory s1:t1", "trajectory s2:t3", "kd"), of_teacher, of_student, strict=True
        )
    }
    changes = [after - before for before, after, _ in (of_teacher, of_student)]
    wanted["delta s2:t3"] = 1 - cosine_similarity(*changes, dim=-1).mean()
    [record] = read_metrics(metrics)
    for term, value in wanted.items():
        assert record[term] == pytest.approx(value.item(), rel=2e-5), term
    # The label of a row's last token is not in the store.
    [said] = re.findall(r"teacher cross-entropy on the first batch: (\S+)", run.out)
    entropy = -of_teacher[-1][:, :-1].gather(-1, ids_BS[:, 1:, None]).mean()
    assert float(said) == pytest.approx(entropy.item(), rel=0.05)
