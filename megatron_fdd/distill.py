"""The training of a student: Megatron's own training loop with a teacher beside the student.

    torchrun --nproc-per-node N -m megatron_fdd.distill --load STUDENT --teacher-load TEACHER --fdd-...

takes any flag of Megatron's `pretrain_gpt.py` and the flags of `megatron_fdd.config`.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from megatron_fdd.host.process import (
    begin_as_rank,
    end_with,
    ended_by_sigterm,
    is_first_rank,
    raise_at_interrupt,
)

if __name__ == "__main__":
    begin_as_rank()

import torch
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from megatron_fdd.host import console, rehearsal
from megatron_fdd.host.start import start

if __name__ == "__main__":
    start()

from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import unwrap_model
from megatron.training import pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.models.gpt import GPTModelConfig

from megatron_fdd.convert.hf_companions import carry_companions, link_left_out
from megatron_fdd.data import full_validation
from megatron_fdd.data.own_datasets import with_checked_lengths
from megatron_fdd.data.provider import train_valid_test_provider
from megatron_fdd.data.store import loader
from megatron_fdd.host.damage import cause_of
from megatron_fdd.host.disk import writing
from megatron_fdd.host.model import build_config, check_same_sizes
from megatron_fdd.host.patches.adam import install_adam
from megatron_fdd.host.patches.helpers import use_built_helpers
from megatron_fdd.host.patches.norms import install_norms
from megatron_fdd.host.patches.rates import resumed_rates
from megatron_fdd.host.plugins import import_plugins, named_plugins
from megatron_fdd.host.saving import last_whole_checkpoint, saved_iteration
from megatron_fdd.host.topology import Topology
from megatron_fdd.losses.terms import active_terms
from megatron_fdd.plan.describe import describe_plan
from megatron_fdd.plan.megatron_errors import ended, is_told, say_error
from megatron_fdd.plan.run import PreparedRun, prepare_run
from megatron_fdd.plan.save_folder import locked
from megatron_fdd.plan.student_arguments import student_checkpoint
from megatron_fdd.step.connect import connect
from megatron_fdd.step.progress import Progress
from megatron_fdd.step.schedule import installed
from megatron_fdd.step.student import StudentForward
from megatron_fdd.step.teacher.followed import FollowedStream
from megatron_fdd.step.teacher.loading import build_teacher
from megatron_fdd.step.teacher.provider import FeatureProvider
from megatron_fdd.step.teacher.stored import PlannedStore
from megatron_fdd.step.term_modules import add_term_modules


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts that an own training script can replace; None: this package's part.

    Attributes:
        pretrain: the training loop, with the interface of `megatron.training.pretrain` 0.19.2.
        datasets: a function from (numbers of train, valid and test samples, vp_stage) to the three datasets. A sample
            has the entries of a sample of `data/datasets.py`. The result must be equal on every rank: its lengths
            are compared, and the ids of each batch checked.
        student: a function from the run's arguments to Megatron's configuration of the student, a GPTModel.
    """

    pretrain: Callable[..., None] | None = None
    datasets: Callable[..., Any] | None = None
    student: Callable[[argparse.Namespace], GPTModelConfig] | None = None


class Distillation:
    """A prepared run with its models, as Megatron's `pretrain` gets them."""

    def __init__(self, run: PreparedRun, parts: Parts) -> None:
        self._run = run
        self._parts = parts
        self._patches = ExitStack()
        self._student_step: StudentForward | None = None
        self._stream = FollowedStream.of(
            run.teacher_stores[0].store if run.teacher_stores else None, run.args, run.config
        )
        terms = tuple(term.kind for term in active_terms(run.config))
        names = [each.named.name for each in run.teacher_stores] if len(run.teacher_stores) > 1 else []
        self._progress = Progress(lambda: run.args.train_iters, terms, teachers=names)

    def train(self) -> None:
        """Run Megatron's own `pretrain`. Collectives: its own, and those that the parts below document."""
        run = self._run
        log = console.keep_log(Path(run.args.save) / "logs" if run.args.save else Path("fdd-logs"))
        if is_first_rank():
            console.say(describe_plan(run.plan, run.args, run.teacher, run.teacher_stores))
            if log is not None:
                console.say(
                    f"loading the models and the data; Megatron's own output: {log.with_name('rank*.log')}"
                )
            _carry_companions(run)
        use_built_helpers()
        install_adam()
        if run.args.transformer_impl == "local":
            install_norms()
        parts = self._parts
        planned = config = build_config(run.args)
        if parts.student is not None:
            check_same_sizes(config := parts.student(run.args), planned)
        config.pre_wrap_hooks += [self._check_files, self._add_terms]
        config.post_wrap_hooks.append(self._attach)
        provider = with_checked_lengths(parts.datasets) if parts.datasets else train_valid_test_provider
        if run.args.full_validation:
            provider = full_validation.with_filler(provider)
        if run.teacher_stores:
            provider = featured = FeatureProvider(provider, run.teacher_stores, run.args, self._stream)
            config.pre_wrap_hooks.append(featured.check_first)
        datasets: Any = partial(provider)
        # With this Megatron builds the loaders on every rank, because each stage with a tap needs the masks.
        datasets.is_distributed = True
        container = pretrain_cfg_container_from_args(run.args, config)
        with self._patches, self._following(), resumed_rates(run.saved_groups, run.args):
            try:
                (parts.pretrain or pretrain)(
                    container, datasets, ModelType.encoder_or_decoder, self.forward_step
                )
            except SystemExit as end:  # from --exit-interval and the like, or Megatron reports a failure
                if end.code is None:  # Megatron ends so, with status 0, where it cannot go on
                    raise ValueError(ended(end)) from end
                self._end()
                if end.code or (is_first_rank() and not self._progress.has_begun):
                    console.show_end_of_log()
                raise
            except CheckpointException as error:  # torch's: it is no Exception, and the same on every rank
                folder, flag = student_checkpoint(run.args)
                if hasattr(run.args, "curr_iteration"):  # the loop has begun: a save in the background failed
                    raise ValueError(
                        f"--save {run.args.save}: a checkpoint could not be written: {cause_of(error)}"
                    ) from error
                raise ValueError(
                    f"{flag} {folder}: the student's checkpoint could not be read: {cause_of(error)}; copy it "
                    "again, or go on from another one (--ckpt-step N)"
                ) from error
            except KeyboardInterrupt:
                self.say_interrupted()
                raise
        self._end()

    @property
    def has_made_a_step(self) -> bool:
        """Whether this start has made a training step."""
        args = self._run.args
        return getattr(args, "curr_iteration", 0) > getattr(args, "iteration", 0)

    @property
    def last_whole_checkpoint(self) -> str:
        """Name the newest whole checkpoint of this run."""
        return last_whole_checkpoint(self._run.args.save)

    def say_interrupted(self) -> None:
        """Write the last line of a run that is stopped from outside, which says how to continue."""
        save = self._run.args.save
        self._progress.interrupted(save, saved_iteration(save))

    @contextmanager
    def _following(self) -> Iterator[None]:
        """Run the training in a `with` block; at its end the stream, if any, is told whether there is more to come."""
        is_over = False
        try:
            yield
            is_over = True
        finally:
            if self._stream is not None:
                self._stream.end(is_over=is_over)

    def _end(self) -> None:
        self._progress.end(self._run.args.save, loaded_iteration=getattr(self._run.args, "iteration", 0))

    def forward_step(self, data_iterator: Iterator[dict[str, Tensor]], model: torch.nn.Module) -> Any:
        """Run a micro-batch, as Megatron's `forward_step_func`."""
        assert self._student_step is not None
        return self._student_step(data_iterator, model)

    def _check_files(self, chunks: list[GPTModel]) -> list[GPTModel]:
        """Refuse wrong files of checkpoints and data before any is loaded, as Megatron's pre-wrap hook."""
        self._run.check_files()
        return chunks

    def _add_terms(self, chunks: list[GPTModel]) -> list[GPTModel]:
        """Join the terms' parameters to the student's chunks, as Megatron's pre-wrap hook."""
        run = self._run
        if run.teacher_size is not None:
            topology = Topology.from_megatron(sequence_parallel=run.args.sequence_parallel)
            plans = run.plan.chunks_on(topology.stage)
            widths = run.args.hidden_size, run.teacher_size.hidden_size
            add_term_modules(chunks, plans, run.config, widths, run.fresh)
        return chunks

    def _attach(self, chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
        """Join the teacher to the student, which is built but not loaded, as Megatron's post-wrap hook."""
        run = self._run
        topology = Topology.from_megatron(sequence_parallel=run.args.sequence_parallel)
        teacher: GPTModel | Sequence[PlannedStore] = run.teacher_stores
        if run.teacher is not None and run.teacher_checkpoint is not None:
            own_experts = topology.with_experts(run.teacher.expert_model_parallel_size)
            teacher = build_teacher(run.teacher, run.teacher_checkpoint, own_experts)
        steps = connect(
            run.plan,
            unwrap_model(chunks),
            teacher,
            topology,
            lambda: getattr(run.args, "curr_iteration", 0),
            seed=run.args.seed,
        )
        writes_metrics = run.args.rank == run.args.world_size - 1  # where Megatron logs
        metrics_file = run.config.metrics_file if writes_metrics else None
        progress = self._progress if is_first_rank() else None
        steps.write_metrics_to(metrics_file, progress, stop_at_nan=run.stop_at_nan)
        if self._stream is not None:
            steps.follow(self._stream)
        self._patches.enter_context(installed(steps))
        self._patches.enter_context(full_validation.installed())
        self._patches.enter_context(loader.installed(whole_steps=run.config.tokens == "all"))
        self._student_step = steps.forward_step
        return chunks


def _carry_companions(run: PreparedRun) -> None:
    """Copy files beside the trained checkpoint, so that it can be exported wherever its folder goes."""
    source, _ = student_checkpoint(run.args)
    if source is not None and run.args.save is not None:
        with writing("--save", run.args.save):
            carry_companions(Path(source), Path(run.args.save))
            link_left_out(Path(source), Path(run.args.save))


def main(parts: Parts = Parts()) -> int:
    """Run as `sys.argv` says. Return the exit status, which is 1 after an error that the user can correct."""
    if rehearsal.is_wanted():
        rehearsal.start()  # a training script may have left its first line out
        sys.argv[1:] = rehearsal.add_flags(sys.argv[1:])
    distillation: Distillation | None = None
    try:
        import_plugins(named_plugins(sys.argv[1:]))
        run = prepare_run(checks_data=parts.datasets is None)
        if run.config.dry_run:
            if is_first_rank():
                console.say(describe_plan(run.plan, run.args, run.teacher, run.teacher_stores))
            return 0
        distillation = Distillation(run, parts)
        # With --exit-signal-handler, Megatron finishes the step and saves.
        is_ours = is_first_rank() and not run.args.exit_signal_handler
        with (
            locked(run.args.save),
            ended_by_sigterm(distillation.say_interrupted) if is_ours else nullcontext(),
        ):
            distillation.train()
    except KeyboardInterrupt:
        console.log_traceback()
        return 128 + signal.SIGINT
    except Exception as error:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise in what follows
        has_trained = distillation is not None and distillation.has_made_a_step
        if has_trained and not is_told(error):
            raise  # the end of the log tells more
        say_error(error, None if distillation is None else distillation.last_whole_checkpoint)
        return 1
    return 0


def run_as_script(parts: Parts = Parts()) -> NoReturn:
    """Run `main` and end this process. It is the last line of a training script; the first is `host.start.start`."""
    raise_at_interrupt()
    end_with(partial(main, parts))


if __name__ == "__main__":
    run_as_script()
