"""Checkpoints with the scales of delayed scaling, as training with TransformerEngine leaves them."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from megatron.core import dist_checkpointing
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.models.gpt import GPTModel

from megatron_fdd.teacher import loading
from megatron_fdd.topology import Topology
from tests.oracle.case import Case
from tests.oracle.models import model_config, padded_vocab
from tests.oracle.reference import STUDENT, TEACHER

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
# Of sums in another order; scales that stay 1 are further from the right ones.
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
    """On every rank: through the loading of a run, for which arguments are made up."""
    options = dict(case.teacher_options)
    args = Namespace(params_dtype=torch.float32, fp8=options.get("fp8"), fp8_recipe=options.get("fp8_recipe"))
    options |= {"fp8_param": "fp8" in options, "transformer_impl": case.transformer_impl}
    config = model_config(case.teacher, topology, torch.float32, **options)
    config.vocab_size = padded_vocab(case.student, topology)
    with patch.object(loading, "model_config", lambda _args: config):
        model = loading.build_teacher(args, checkpoint, topology)
    assert any(is_float8tensor(parameter) for parameter in model.parameters()) == options["fp8_param"]
    return model
