"""The teacher of the engine `megatron`, from the command line to the engine."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron.training.initialize import initialize_megatron

from megatron_fdd.host import rehearsal
from megatron_fdd.host.patches.helpers import use_built_helpers
from megatron_fdd.host.patches.norms import install_norms
from megatron_fdd.host.plugins import import_plugins, named_plugins
from megatron_fdd.host.topology import Topology
from megatron_fdd.host.weights_digest import weights_digest
from megatron_fdd.plan.context import StoredModel
from megatron_fdd.plan.run import PreparedRun, prepare_run
from megatron_fdd.plan.teacher_store import check_attention
from megatron_fdd.step.teacher.loading import build_teacher
from megatron_fdd.teach.engine import Engine
from megatron_fdd.teach.megatron import MegatronEngine, describe
from megatron_fdd.teach.request import TeachRequest, batch_sizes, chosen_blocks


class MegatronTeacher:
    """A teacher's checkpoint in a run of its own; what `PreparedTeacher` says.

    Raises:
        ValueError: something given is wrong, or the checkpoint cannot be read.
    """

    unknown: frozenset[str] = frozenset({"weights"})

    def __init__(self, request: TeachRequest) -> None:
        stored = StoredModel.find(str(request.teacher), "--teacher", to_plan=False)
        blocks = chosen_blocks(request, stored.args.num_layers)
        self._run = _prepare(request, blocks)
        self.args: argparse.Namespace = self._run.args
        self.companions = Path(request.teacher)
        self.outline = describe(self._run, blocks, request.form)

    def start(self) -> None:
        """Make the process groups, as Megatron's `pretrain` does."""
        use_built_helpers()
        if self.args.transformer_impl == "local":
            install_norms()
        initialize_megatron()

    def engine(self) -> Engine:
        """Check the files that all ranks read together, and load the teacher.

        Collectives: those of `check_files`, `build_teacher` and `weights_digest`.
        """
        run = self._run
        run.check_files()
        assert run.teacher is not None
        assert run.teacher_checkpoint is not None
        topology = Topology.from_megatron(sequence_parallel=run.args.sequence_parallel)
        experts = topology.with_experts(run.teacher.expert_model_parallel_size)
        model = build_teacher(run.teacher, run.teacher_checkpoint, experts)
        weights = weights_digest(model, experts.collection)
        return MegatronEngine(replace(self.outline, weights=weights), model, topology)


def _prepare(request: TeachRequest, blocks: Sequence[int]) -> PreparedRun:
    """Prepare a run whose student is the teacher, and is never built."""
    if rehearsal.is_wanted() and any(each.startswith("--teacher-fp8-format") for each in request.flags):
        raise ValueError(
            "--teacher-fp8-format: a rehearsal on CPUs has no FP8, and the store would hold features of another "
            "precision; leave it out here, and give it on a GPU with TransformerEngine"
        )
    world, teacher = os.environ.get("WORLD_SIZE", "1"), str(request.teacher)
    pairs = ",".join(f"{block}:{block}" for block in blocks)
    sizes = batch_sizes(request)
    sys.argv[1:] = [
        *("--lr", "1e-4"),
        *request.flags,
        *("--use-checkpoint-args", "--pretrained-checkpoint", teacher, "--teacher-load", teacher),
        *("--fdd-layer-pairs", pairs, "--fdd-alpha", "1", "--fdd-beta", "0"),
        *("--micro-batch-size", "1", "--global-batch-size", world),
        *("--eval-micro-batch-size", "1", "--eval-global-batch-size", world),
    ]
    if rehearsal.is_wanted():
        sys.argv[1:] = rehearsal.add_flags(sys.argv[1:])
    import_plugins(named_plugins(sys.argv[1:]))
    run = prepare_run()
    check_attention(run.args)
    check_capacity(run)
    # These only say how much of the data is read.
    run.args.global_batch_size, run.args.eval_global_batch_size = sizes
    return run


def check_capacity(run: PreparedRun) -> None:
    """Refuse a teacher whose experts drop tokens: its states depend on what else is in a batch.

    Raises:
        ValueError: names its setting.
    """
    capacity = getattr(run.teacher, "moe_expert_capacity_factor", None)
    if capacity is not None:
        raise ValueError(
            f"--teacher {run.config.teacher_load}: its experts drop tokens beyond moe_expert_capacity_factor "
            f"{capacity}, so that its states depend on what else is in a batch, and cannot be stored by text; train "
            "beside it with --teacher-load"
        )
