"""Distil: Megatron's own training loop with a teacher beside the student.

    torchrun --nproc-per-node N -m megatron_fdd.distill --load STUDENT --teacher-load TEACHER --fdd-...

takes any flag of Megatron's `pretrain_gpt.py` and those of `megatron_fdd.config`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from megatron_fdd import rehearsal

if __name__ == "__main__" and rehearsal.is_wanted():
    rehearsal.start()  # before Megatron looks for a GPU

from megatron.core.enums import ModelType
from megatron.training import pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args

from megatron_fdd.arguments import model_config, student_checkpoint
from megatron_fdd.checkpoint import cause_of
from megatron_fdd.convert.companions import carry_companions
from megatron_fdd.data.provider import train_valid_test_provider
from megatron_fdd.dry_run import describe_plan
from megatron_fdd.lens import Lens, read_lens
from megatron_fdd.objective import Objective
from megatron_fdd.ops.linear_kl import VocabShard
from megatron_fdd.run import Run, is_first_rank, prepare_run
from megatron_fdd.schedule import DistillationSteps, installed
from megatron_fdd.student import StudentStep
from megatron_fdd.teacher.check import report_cross_entropy
from megatron_fdd.teacher.live import LiveTeacher
from megatron_fdd.teacher.loading import build_teacher
from megatron_fdd.topology import Topology
from megatron_fdd.wheel import use_built_helpers


class Distillation:
    """A prepared run with its models: what Megatron's `pretrain` is given."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._patches = ExitStack()
        self._student_step: StudentStep | None = None

    def train(self) -> None:
        """Megatron's own `pretrain`. Collectives: its own, and those that the parts below document."""
        run = self._run
        if is_first_rank():
            print(describe_plan(run.config, run.pairs, run.args, run.teacher, run.vocab_size), flush=True)
            _carry_companions(run)
        use_built_helpers()
        config = model_config(run.args)
        config.post_wrap_hooks.append(self._attach)
        container = pretrain_cfg_container_from_args(run.args, config)
        with self._patches:
            try:
                pretrain(
                    container, train_valid_test_provider, ModelType.encoder_or_decoder, self.forward_step
                )
            except CheckpointException as error:  # torch's; no Exception, and the same on every rank
                raise ValueError(
                    f"the student's checkpoint (--load {run.args.load}, --save {run.args.save}) "
                    f"could not be read or written: {cause_of(error)}"
                ) from error

    def forward_step(self, data_iterator: Iterator[dict[str, Tensor]], model: torch.nn.Module) -> Any:
        """Megatron's `forward_step_func`."""
        assert self._student_step is not None
        return self._student_step(data_iterator, model)

    def _attach(self, chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
        """Megatron's post-wrap hook: the student is built and not yet loaded; the teacher joins it."""
        run = self._run
        topology = Topology.from_megatron(sequence_parallel=run.args.sequence_parallel)
        shard = vocab_shard(run.args.padded_vocab_size, run.vocab_size, topology)
        teacher, teacher_lens = self._build_teacher(topology)
        objective = Objective(run.config, run.pairs, shard, teacher_lens)
        step = StudentStep(objective, teacher, topology)
        if teacher_lens is not None:
            step.first_batch_check = partial(
                report_cross_entropy, lens=teacher_lens, shard=shard, group=topology.rows_group
            )
        writes_metrics = run.args.rank == run.args.world_size - 1  # where Megatron logs
        path = run.config.metrics_file if writes_metrics else None
        steps = DistillationSteps(objective, topology.rows_group, path, stop_at_nan=run.stop_at_nan)
        self._patches.enter_context(installed(steps))
        self._student_step = step
        return chunks

    def _build_teacher(self, topology: Topology) -> tuple[LiveTeacher | None, Lens | None]:
        run = self._run
        if run.teacher is None or run.teacher_checkpoint is None:
            return None, None
        model = build_teacher(run.teacher, run.teacher_checkpoint, topology)
        teacher = LiveTeacher(model, [pair.teacher_layer for pair in run.pairs])
        return teacher, read_lens(model, with_norm=run.config.lens_norm == "final", detached=True)


def _carry_companions(run: Run) -> None:
    """So that the trained checkpoint can be exported wherever its folder goes."""
    source, _ = student_checkpoint(run.args)
    if source is not None and run.args.save is not None:
        carry_companions(Path(source), Path(run.args.save))


def vocab_shard(padded_vocab_size: int, vocab_size: int, topology: Topology) -> VocabShard:
    """This rank's slice of both heads; rows from `vocab_size` on are padding."""
    rows = padded_vocab_size // topology.tensor_size
    first = topology.tensor_rank * rows
    num_valid = min(max(vocab_size - first, 0), rows)
    return VocabShard(first, num_valid, topology.tensor_group, topology.sequence_parallel)


def main() -> int:
    """Run as `sys.argv` says. Returns the exit status: 1 after an error that the user can mend."""
    if rehearsal.is_wanted():
        sys.argv[1:] = rehearsal.add_flags(sys.argv[1:])
    try:
        run = prepare_run()
        if run.config.dry_run:
            if is_first_rank():
                print(describe_plan(run.config, run.pairs, run.args, run.teacher, run.vocab_size))
            return 0
        Distillation(run).train()
    except (ValueError, FloatingPointError) as error:
        if is_first_rank():
            print(f"megatron_fdd: error: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        if torch.distributed.is_initialized() and __name__ == "__main__":
            torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
