"""Wrappers around Megatron's schedule, evaluation, log and save: names of `megatron.training` replaced in training.

`installed` replaces them while a run trains (`host/patches/table.py` lists every replaced name, here and elsewhere).
The rest of the training loop is Megatron's own.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import megatron.training.training as megatron_training
import torch
from megatron.training import get_args
from torch import Tensor

from megatron_fdd.data.batch import Wait, checked_batches, peek, read_ahead
from megatron_fdd.host.patches.table import replaced
from megatron_fdd.host.topology import Topology
from megatron_fdd.losses.chunk_loss import StepSettings
from megatron_fdd.losses.sampling import EVERYTHING, Sampler
from megatron_fdd.losses.terms import VALIDATION
from megatron_fdd.step.finite import check_gradient_finite, check_means_finite
from megatron_fdd.step.metrics import MetricsFile, Report, add_up, without_shares
from megatron_fdd.step.pipeline import PipelineWork
from megatron_fdd.step.progress import Progress, Step
from megatron_fdd.step.saves import Saves
from megatron_fdd.step.student import StudentForward
from megatron_fdd.step.teacher.followed import FollowedStream
from megatron_fdd.step.validation import Evaluation, Validation


class StepHooks:
    """The actions before and after each call of a schedule, and at each log line.

    Args:
        pipeline: the additions of several stages; None with one stage.
        sampler: draws the tokens and taps that a training step uses; an evaluation uses all of them.
        iteration: returns how many steps are done.
        vocab_size: number of ids that tokenizer, teacher and student share; every batch is held to it.
    """

    def __init__(
        self,
        step: StudentForward,
        topology: Topology,
        pipeline: PipelineWork | None,
        sampler: Sampler,
        iteration: Callable[[], int],
        vocab_size: int,
    ) -> None:
        self._step = step
        self._report = Report(step.objectives, step.teachers)
        self._topology = topology
        self._pipeline = pipeline
        self._sampler = sampler
        self._iteration, self._vocab_size = iteration, vocab_size
        self._stream: FollowedStream | None = None
        self._metrics_path: str | None = None
        self._stop_at_nan = True
        self._metrics_file: MetricsFile | None = None
        self._progress: Progress | None = None
        self._means: dict[str, Tensor] = {}
        self._sums: Tensor | None = None
        self._validation = Validation(self._report, topology)
        self._started_s, self._wait = 0.0, Wait()
        # Since the last line of `_progress`.
        self._seconds = 0.0
        self._tokens: Tensor | None = None

    @property
    def forward_step(self) -> StudentForward:
        """The function that Megatron takes as its `forward_step_func`."""
        return self._step

    def follow(self, stream: FollowedStream) -> None:
        """Tell a stream of the teacher's features when steps end, and when checkpoints are whole."""
        self._stream = stream

    def write_metrics_to(
        self, metrics_path: str | None, progress: Progress | None, *, stop_at_nan: bool
    ) -> None:
        """Choose where the results go, and whether a loss that is not finite stops the run.

        Args:
            metrics_path: file for one JSON object per iteration; None on ranks that write no file.
            progress: writes the lines for people; None on ranks that write none.
            stop_at_nan: whether to check every step's loss before the optimizer runs (one host synchronisation).
        """
        self._metrics_path, self._progress, self._stop_at_nan = metrics_path, progress, stop_at_nan

    def run(
        self, schedule: Callable[..., list[dict[str, Tensor]]], **keywords: Any
    ) -> list[dict[str, Tensor]]:
        """Run one step's micro-batches, and return what Megatron logs; nothing for a step of a validation.

        Collectives: those of `PipelineWork.prepare` and `StudentForward.begin_step`; one all-reduce of the token
        counts if two kinds of tokens are in use; those of the schedule; those of `add_up`.

        Raises:
            FloatingPointError: the loss is not finite; raised on every rank, before the optimizer sees the gradients.
            ValueError: a batch has an id that is not in the vocabulary, or cannot be read; raised on the ranks that
                read it.
        """
        self._started_s = time.perf_counter()
        iteration = self._iteration()
        if self._stream is not None:
            self._stream.begin()
        self._wait = Wait()
        keywords["data_iterator"] = checked_batches(
            keywords["data_iterator"], self._vocab_size, keywords["seq_length"], iteration, self._wait
        )
        ratio = self._prepare(keywords)
        inner = self._step.objectives[0].config.weight_scale(iteration)
        draw = EVERYTHING if keywords.get("forward_only") else self._sampler.draw(iteration)
        self._step.begin_step(StepSettings(inner, ratio, draw))
        dicts = schedule(**keywords)
        if keywords.get("collect_non_loss_data"):
            return dicts
        sums = add_up(self._step.take_sums(), self._topology)
        if self._stream is not None:
            self._stream.step_ended()
        if keywords.get("forward_only"):
            self._validation.add(sums)
            return []
        self._sums, self._means = sums, self._report.means(sums)
        if self._stop_at_nan:
            check_means_finite(self._means)
        return [self._means] if self._topology.is_last_stage else []

    @property
    def validation(self) -> Validation:
        """What Megatron's evaluation runs in."""
        return self._validation

    def log(self, bound: inspect.BoundArguments) -> None:
        """Append the iteration to the metrics file. `bound`: the arguments of Megatron's `training_log`.

        Raises:
            FloatingPointError: the gradient is not finite; raised on every rank, before a checkpoint is written.
        """
        values = bound.arguments
        if self._stop_at_nan:
            check_gradient_finite(values["grad_norm"], values["iteration"])
        self._say_step(values)
        if self._metrics_path is None or not values["loss_dict"]:
            return
        iteration = values["iteration"]
        if self._metrics_file is None:
            self._metrics_file = MetricsFile(self._metrics_path, iteration)
        assert self._sums is not None
        record = self._report.record(self._sums, values["loss_dict"])
        grad_norm = values["grad_norm"]
        record["grad_norm"] = None if grad_norm is None else float(grad_norm)
        record["seconds"] = round(time.perf_counter() - self._started_s, 4)
        record["data_seconds"] = round(self._wait.seconds, 4)
        self._metrics_file.write(iteration, record)

    def log_evaluation(self, bound: inspect.BoundArguments) -> None:
        """Append the means over all sets. `bound`: the arguments of Megatron's `evaluate_and_print_results`."""
        means = self._validation.take_means()
        if not means or (self._metrics_file is None and self._progress is None):
            return
        numbers = dict(zip(means, torch.stack(list(means.values())).tolist(), strict=True))
        iteration = bound.arguments["iteration"]
        # Megatron gives each evaluation a title; nothing else tells which data it used.
        prefix = bound.arguments["prefix"]
        # After the last step Megatron evaluates on the validation set once more. If the last `valid` was at the same
        # step, its samples were others, unless both had all (--full-validation).
        what = "test" if "test set" in prefix else "final" if "validation set" in prefix else "valid"
        if self._progress is not None:
            self._progress.evaluation(what, iteration, numbers)
        if self._metrics_file is not None and what != "test":
            self._metrics_file.write(
                iteration, {f"{VALIDATION}{name}": number for name, number in numbers.items()}
            )

    def begin_save(self) -> Callable[[], None]:
        """Note that a checkpoint is begun; return what is to be called when it is whole."""
        return (lambda: None) if self._stream is None else self._stream.save()

    def log_checkpoint(self, iteration: int, seconds: float) -> None:
        """Write the line about a saved checkpoint."""
        if self._progress is not None:
            args = get_args()
            self._progress.saved(iteration, args.save, seconds, is_on_disk=not args.async_save)

    def _prepare(self, keywords: dict[str, Any]) -> float:
        """Do the work before the schedule, and set its keywords; return the ratio of the two token counts."""
        pipeline, ratio = self._pipeline, 1.0
        counts_all = self._step.objectives[0].config.tokens == "all"
        if pipeline is None and not counts_all:
            return ratio
        if counts_all or (pipeline is not None and pipeline.has_teacher):
            # The work before the first gradient needs all of the step's batches.
            batches, keywords["data_iterator"] = read_ahead(**keywords)
            ratio = self._term_per_label_token(batches)
        else:
            batches, keywords["data_iterator"] = peek(keywords["data_iterator"])
        if "cu_seqlens" in batches[0]:  # with packed sequences, a micro-batch is one row
            keywords["seq_length"] *= keywords["micro_batch_size"]
            keywords["micro_batch_size"] = 1
        if pipeline is not None:
            pipeline.prepare(batches, keywords["seq_length"], keywords["micro_batch_size"])
            keywords |= pipeline.schedule_keywords(keywords["seq_length"])
        return ratio

    def _say_step(self, values: dict[str, Any]) -> None:
        """Add this step to the sums; write a line where Megatron logs one, and at the end.

        Args:
            values: arguments of Megatron's `training_log`.
        """
        if self._progress is None or self._sums is None:
            return
        self._seconds += time.perf_counter() - self._started_s
        self._tokens = self._report.label_tokens(self._sums) + (0 if self._tokens is None else self._tokens)
        args, iteration = get_args(), values["iteration"]
        self._progress.made(iteration)
        if (
            iteration % args.log_interval
            and not values["is_first_iteration"]
            and iteration < args.train_iters
        ):
            return
        shown = self._report.record(self._sums, without_shares(self._means))
        norm, rate = values["grad_norm"], values["learning_rate"]
        step = Step(
            iteration,
            shown,
            None if rate is None else float(rate),
            None if norm is None else float(norm),
            self._tokens.item(),
            self._seconds,
        )
        self._seconds, self._tokens = 0.0, None
        self._progress.step(step)

    def _term_per_label_token(self, batches: list[dict[str, Tensor]]) -> float:
        """Return the global ratio of the two token counts. Collectives: one all-reduce of both, where they differ."""
        if self._step.objectives[0].config.tokens == "labels":
            return 1.0
        counts = torch.stack(
            [torch.stack([batch["loss_mask"].sum(), batch["token_mask"].sum()]).float() for batch in batches]
        ).sum(0)
        counts = counts.to(torch.cuda.current_device())
        torch.distributed.all_reduce(counts, group=self._topology.rows_group)
        label_tokens, term_tokens = counts.tolist()
        return term_tokens / max(label_tokens, 1.0)


@contextmanager
def installed(steps: StepHooks) -> Iterator[None]:
    """Replace Megatron's schedule lookup (training, evaluation), evaluation, two logs and save in a `with` block."""
    original_lookup = megatron_training.get_forward_backward_func
    original_log = megatron_training.training_log
    original_evaluate = megatron_training.evaluate
    original_evaluation = megatron_training.evaluate_and_print_results
    saves = Saves(steps.begin_save, steps.log_checkpoint)
    signature, evaluation_signature = inspect.signature(original_log), inspect.signature(original_evaluation)

    def lookup(*args: Any, **keywords: Any) -> Callable[..., list[dict[str, Tensor]]]:
        schedule = original_lookup(*args, **keywords)

        def run(**call: Any) -> list[dict[str, Tensor]]:
            return steps.run(schedule, **call)

        return run

    def log(*args: Any, **keywords: Any) -> bool:
        steps.log(signature.bind(*args, **keywords))
        return original_log(*args, **keywords)

    def evaluate(*args: Any, **keywords: Any) -> Evaluation:
        return steps.validation.evaluate(original_evaluate, *args, **keywords)

    def evaluate_and_print(*args: Any, **keywords: Any) -> None:
        original_evaluation(*args, **keywords)
        steps.log_evaluation(evaluation_signature.bind(*args, **keywords))

    stand_ins: dict[str, Callable[..., Any]] = {
        "megatron.training.training.get_forward_backward_func": lookup,
        "megatron.training.training.training_log": log,
        "megatron.training.training.evaluate": evaluate,
        "megatron.training.training.evaluate_and_print_results": evaluate_and_print,
        "megatron.training.training.save_checkpoint": saves.save_checkpoint,
        "megatron.training.checkpointing.schedule_async_save": saves.schedule_async_save,
    }
    with replaced(stand_ins):
        yield
