"""Checkpoints with the scales of delayed scaling, as saved by training with TransformerEngine."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from megatron.core import dist_checkpointing
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_fdd.data.batch import get_batch
from megatron_fdd.host.topology import Topology
from megatron_fdd.step.teacher import loading
from megatron_fdd.step.teacher.beside import BesideTeacher
from megatron_fdd.step.teacher.scales import fp8_linears
from tests.oracle.case import Case, case_batches, join, schedule_step
from tests.oracle.models import build_student, model_config, padded_vocab
from tests.oracle.reference import STUDENT, TEACHER, random_weights

TRUST = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
HISTORY = 4
DELAYED = (("fp8", "hybrid"), ("fp8_recipe", "delayed"), ("fp8_amax_history_len", HISTORY))
CASE = Case(
    transformer_impl="transformer_engine",
    student=replace(STUDENT, hidden=64, heads=16, groups=8, head_width=8, ffn=96),
    teacher=replace(TEACHER, hidden=96, heads=16, groups=16, head_width=8, ffn=128),
    length=16,
    student_options=DELAYED,
    teacher_options=DELAYED,
)
# The tolerance for sums in another order; scales that stay 1 give a larger error than WRONG.
ORDER_TOLERANCE, WRONG = 1e-5, 0.1


@contextmanager
def trusted(value: str = "1") -> Iterator[None]:
    with patch.dict(os.environ, {TRUST: value}):
        yield


def save(model: GPTModel, path: Path, *, extra_state: bool = True) -> None:
    content = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    groups = Topology.from_megatron(sequence_parallel=False).collection
    sharded = model.sharded_state_dict(metadata={**content, "dp_cp_group": groups.dp_cp})
    if not extra_state:
        sharded = {key: value for key, value in sharded.items() if "_extra_state" not in key}
    if torch.distributed.get_rank() == 0:
        path.mkdir()
    torch.distributed.barrier()
    dist_checkpointing.save({"model": sharded}, str(path), content_metadata=content)


def load(case: Case, topology: Topology, *, checkpoint: Path) -> GPTModel:
    """Load, on every rank, as a run does, with made-up arguments."""
    options = dict(case.teacher_options)
    args = Namespace(params_dtype=torch.float32, fp8=options.get("fp8"), fp8_recipe=options.get("fp8_recipe"))
    options |= {"fp8_param": "fp8" in options, "transformer_impl": case.transformer_impl}
    topology = topology.with_experts(case.teacher_ep)
    config = model_config(case.teacher, topology, torch.float32, **options)
    config.vocab_size = padded_vocab(case.student, topology)
    with patch.object(loading, "build_config", lambda _args: config):
        model = loading.build_teacher(args, checkpoint, topology)
    assert any(is_float8tensor(parameter) for parameter in model.parameters()) == options["fp8_param"]
    return model


TAPS = (2, 7)


def trained_model(case: Case, num_steps: int) -> GPTModel:
    """Return, on every rank, the case's teacher after steps of plain training; with none it has run once."""
    topology = Topology.from_megatron(sequence_parallel=False)
    chunks = build_student(
        case.teacher, random_weights(case.teacher, 2), topology, torch.float32,
        transformer_impl="transformer_engine", **dict(case.teacher_options),
    )  # fmt: skip
    batches = case_batches(case)
    for batch in batches[:num_steps]:
        chunks[0].zero_grad_buffer()
        unwrap_model(chunks)[0].set_is_first_microbatch()  # new weights have to be rounded to FP8 again
        chunks[0](batch["tokens"], batch["position_ids"], None, labels=batch["labels"]).mean().backward()
        descend(chunks, 0.1)
    model = unwrap_model(chunks)[0].eval()
    model.set_is_first_microbatch()
    features(model, case)
    return model


def descend(chunks: list[torch.nn.Module], rate: float) -> None:
    """Make a step of plain gradient descent."""
    with torch.no_grad():
        for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
            parameter.sub_(rate * parameter.main_grad)


def features(model: GPTModel, case: Case) -> list[Tensor]:
    """Return, on every rank without a pipeline, hidden states of a batch that no training has seen."""
    batch = get_batch(iter(case_batches(case)[-1:]), "cpu")
    found = BesideTeacher(model, TAPS).features(0, batch)
    return [found.final_SBT, *found.taps_SBT.values()]


def loaded_features(case: Case, checkpoint: Path) -> list[Tensor]:
    """Return, on every rank, the features of the model in a checkpoint."""
    with trusted():
        model = load(
            case, Topology.from_megatron(sequence_parallel=case.sequence_parallel), checkpoint=checkpoint
        )
    return features(model, case)


def scales(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return all that delayed scaling keeps between steps, for every linear."""
    return {
        f"{name} {way} {what}": getattr(module.fp8_meta[way], what).clone()
        for name, module in fp8_linears(model)
        for way in ("scaling_fwd", "scaling_bwd")
        for what in ("scale", "amax_history")
    }


def train_beside(case: Case, checkpoint: Path) -> tuple[list[str], list[str], dict[str, float]]:
    """Return, on every rank, the scales that three steps change, the teacher's and the student's; the first means."""
    with trusted():
        chunks, teacher, steps = join(case, make_teacher=partial(load, checkpoint=checkpoint))
    student, first = unwrap_model(chunks)[0], {}
    before, changed = scales(teacher), []
    for index in range(3):
        means = schedule_step(case, chunks, steps)
        descend(chunks, 1e-3)
        first = first or {name: value.item() for name, value in (means[0] if means else {}).items()}
        if index == 0 and dict(case.student_options)["fp8_recipe"] == "delayed":
            changed = [name for name, value in scales(student).items() if bool((value != 1).any())]
    after = scales(teacher)
    assert before.keys() == after.keys()
    assert before
    return [name for name in before if not torch.equal(before[name], after[name])], changed, first
