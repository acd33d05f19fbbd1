"""Wrappers around Megatron's schedule, log and save: the names of `megatron.training` that we replace while training.

`installed` replaces them while a run trains (`host/patches/table.py` lists every replaced name, here and elsewhere).
The rest of the training loop is Megatron's own.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import megatron.training.training as megatron_training
import torch
from megatron.training import get_args
from torch import Tensor

from megatron_fdd.data.batch import checked_batches
from megatron_fdd.host.patches.table import replaced
from megatron_fdd.host.topology import Topology
from megatron_fdd.losses.objective import StepSettings
from megatron_fdd.losses.sampling import EVERYTHING, Sampler
from megatron_fdd.losses.terms import TERMS
from megatron_fdd.step.metrics import MetricsFile, step_means
from megatron_fdd.step.pipeline import PipelineWork
from megatron_fdd.step.progress import Progress, Step
from megatron_fdd.step.saves import Saves
from megatron_fdd.step.student import StudentForward


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
        self._topology = topology
        self._pipeline = pipeline
        self._sampler = sampler
        self._iteration, self._vocab_size = iteration, vocab_size
        self._metrics_path: str | None = None
        self._stop_at_nan = True
        self._metrics_file: MetricsFile | None = None
        self._progress: Progress | None = None
        self._means: dict[str, Tensor] = {}
        self._label_tokens: Tensor | None = None
        self._evaluation: dict[str, Tensor] = {}
        self._started_s = 0.0
        # Since the last line of `_progress`.
        self._seconds = 0.0
        self._tokens: Tensor | None = None

    @property
    def forward_step(self) -> StudentForward:
        """The function that Megatron takes as its `forward_step_func`."""
        return self._step

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
        """Run one step's micro-batches, and return what Megatron logs.

        Collectives: those of `PipelineWork.prepare` and `StudentForward.begin_step`; one all-reduce of the token
        counts if two kinds of tokens are in use; those of the schedule; those of `step_means`.

        Raises:
            FloatingPointError: the loss is not finite; raised on every rank, before the optimizer sees the gradients.
            ValueError: a batch has an id that is not in the vocabulary; raised on the ranks that read it.
        """
        self._started_s = time.perf_counter()
        iteration = self._iteration()
        keywords["data_iterator"] = checked_batches(keywords["data_iterator"], self._vocab_size, iteration)
        ratio = 1.0
        if self._pipeline is not None or self._step.objective.config.tokens == "all":
            # The work before the first gradient needs all of the step's batches.
            batches, keywords["data_iterator"] = _read_ahead(**keywords)
            ratio = self._label_per_term_token(batches)
            if "cu_seqlens" in batches[0]:  # with packed sequences, a micro-batch is one row
                keywords["seq_length"] *= keywords["micro_batch_size"]
                keywords["micro_batch_size"] = 1
            if self._pipeline is not None:
                self._pipeline.prepare(batches, keywords["seq_length"], keywords["micro_batch_size"])
                keywords |= self._pipeline.schedule_keywords(keywords["seq_length"])
        inner = self._step.objective.config.weight_scale(iteration)
        draw = EVERYTHING if keywords.get("forward_only") else self._sampler.draw(iteration)
        self._step.begin_step(StepSettings(inner, ratio, draw))
        dicts = schedule(**keywords)
        if keywords.get("collect_non_loss_data"):
            return dicts
        self._label_tokens, means = step_means(self._step.objective, self._step.take_sums(), self._topology)
        if self._stop_at_nan and not keywords.get("forward_only"):
            _check_finite(means)
        if keywords.get("forward_only"):
            # Megatron's evaluation weights steps by the second element.
            means = {
                name: torch.stack([mean * self._label_tokens, self._label_tokens])
                for name, mean in means.items()
                if not name.startswith("share ")
            }
            self._evaluation = {name: pair + self._evaluation.get(name, 0) for name, pair in means.items()}
        else:
            self._means = means
        return [means] if self._topology.is_last_stage else []

    def log(self, bound: inspect.BoundArguments) -> None:
        """Append the iteration to the metrics file. `bound`: the arguments of Megatron's `training_log`.

        Raises:
            FloatingPointError: the gradient is not finite; raised on every rank, before a checkpoint is written.
        """
        values = bound.arguments
        if self._stop_at_nan:
            _check_gradient(values["grad_norm"], values["iteration"])
        self._say_step(values)
        if self._metrics_path is None or not values["loss_dict"]:
            return
        iteration = values["iteration"]
        if self._metrics_file is None:
            self._metrics_file = MetricsFile(self._metrics_path, iteration)
        assert self._label_tokens is not None
        names = list(values["loss_dict"])
        numbers = torch.stack([self._label_tokens, *(values["loss_dict"][name] for name in names)]).tolist()
        record: dict[str, float | None] = {"tokens": int(numbers[0])}
        record |= dict.fromkeys(("total", *(term.kind for term in TERMS)))
        measured = self._step.objective.measured
        record |= {name: measured(name, value) for name, value in zip(names, numbers[1:], strict=True)}
        grad_norm = values["grad_norm"]
        record["grad_norm"] = None if grad_norm is None else float(grad_norm)
        record["seconds"] = round(time.perf_counter() - self._started_s, 4)
        self._metrics_file.write(iteration, record)

    def log_evaluation(self, bound: inspect.BoundArguments) -> None:
        """Append the validation's means. `bound`: the arguments of Megatron's `evaluate_and_print_results`."""
        sums, self._evaluation = self._evaluation, {}
        if not sums or (self._metrics_file is None and self._progress is None):
            return
        means = torch.stack([total / tokens.clamp(min=1) for total, tokens in sums.values()]).tolist()
        iteration = bound.arguments["iteration"]
        # Megatron gives each evaluation a title; nothing else tells which data it used.
        prefix = bound.arguments["prefix"]
        # After the last step Megatron evaluates on the validation set once more. If the last `valid` was at the same
        # step, its samples were others.
        what = "test" if "test set" in prefix else "final" if "validation set" in prefix else "valid"
        if self._progress is not None:
            self._progress.evaluation(what, iteration, dict(zip(sums, means, strict=True)))
        if self._metrics_file is not None and what != "test":
            names = [f"valid {name}" for name in sums]
            self._metrics_file.write(iteration, dict(zip(names, means, strict=True)))

    def log_checkpoint(self, iteration: int, seconds: float) -> None:
        """Write the line about a saved checkpoint."""
        if self._progress is not None:
            args = get_args()
            self._progress.saved(iteration, args.save, seconds, is_on_disk=not args.async_save)

    def _say_step(self, values: dict[str, Any]) -> None:
        """Add this step to the sums; write a line where Megatron logs one, and at the end.

        Args:
            values: arguments of Megatron's `training_log`.
        """
        if self._progress is None or self._label_tokens is None:
            return
        self._seconds += time.perf_counter() - self._started_s
        self._tokens = self._label_tokens + (0 if self._tokens is None else self._tokens)
        args, iteration = get_args(), values["iteration"]
        self._progress.made(iteration)
        if (
            iteration % args.log_interval
            and not values["is_first_iteration"]
            and iteration < args.train_iters
        ):
            return
        shown = [name for name in self._means if not name.startswith("share ")]
        tokens, *numbers = torch.stack([self._tokens, *(self._means[name] for name in shown)]).tolist()
        norm, rate = values["grad_norm"], values["learning_rate"]
        step = Step(
            iteration,
            dict(zip(shown, numbers, strict=True)),
            None if rate is None else float(rate),
            None if norm is None else float(norm),
            tokens,
            self._seconds,
        )
        self._seconds, self._tokens = 0.0, None
        self._progress.step(step)

    def _label_per_term_token(self, batches: list[dict[str, Tensor]]) -> float:
        """Return the global ratio of the two token counts. Collectives: one all-reduce of both, where they differ."""
        if self._step.objective.config.tokens == "labels":
            return 1.0
        counts = torch.stack(
            [torch.stack([batch["loss_mask"].sum(), batch["token_mask"].sum()]).float() for batch in batches]
        ).sum(0)
        counts = counts.to(torch.cuda.current_device())
        torch.distributed.all_reduce(counts, group=self._topology.rows_group)
        label_tokens, term_tokens = counts.tolist()
        return label_tokens / max(term_tokens, 1.0)


def _read_ahead(
    *, data_iterator: Any, num_microbatches: int, **_: Any
) -> tuple[list[dict[str, Tensor]], Any]:
    """Return the step's batches, and iterators over them to replace Megatron's (one per chunk with virtual stages)."""
    if not isinstance(data_iterator, list):
        batches = [next(data_iterator) for _ in range(num_microbatches)]
        return batches, iter(batches)
    # Every chunk has a loader of its own over the same samples; all must advance equally.
    by_chunk = [[next(iterator) for _ in range(num_microbatches)] for iterator in data_iterator]
    return by_chunk[0], [iter(batches) for batches in by_chunk]


_REMEDY = "Lower --lr or raise --lr-warmup-iters, look at the data of this step, or continue from the last checkpoint"


@contextmanager
def installed(steps: StepHooks) -> Iterator[None]:
    """Replace Megatron's schedule lookup (training, evaluation), two log functions and its save in a `with` block."""
    original_lookup = megatron_training.get_forward_backward_func
    original_log = megatron_training.training_log
    original_evaluation = megatron_training.evaluate_and_print_results
    saves = Saves(steps.log_checkpoint)
    signature, evaluation_signature = inspect.signature(original_log), inspect.signature(original_evaluation)

    def lookup(*args: Any, **keywords: Any) -> Callable[..., list[dict[str, Tensor]]]:
        schedule = original_lookup(*args, **keywords)

        def run(**call: Any) -> list[dict[str, Tensor]]:
            return steps.run(schedule, **call)

        return run

    def log(*args: Any, **keywords: Any) -> bool:
        steps.log(signature.bind(*args, **keywords))
        return original_log(*args, **keywords)

    def evaluate(*args: Any, **keywords: Any) -> None:
        original_evaluation(*args, **keywords)
        steps.log_evaluation(evaluation_signature.bind(*args, **keywords))

    stand_ins: dict[str, Callable[..., Any]] = {
        "megatron.training.training.get_forward_backward_func": lookup,
        "megatron.training.training.training_log": log,
        "megatron.training.training.evaluate_and_print_results": evaluate,
        "megatron.training.training.save_checkpoint": saves.save_checkpoint,
        "megatron.training.checkpointing.schedule_async_save": saves.schedule_async_save,
    }
    with replaced(stand_ins):
        yield


def _check_finite(means: dict[str, Tensor]) -> None:
    """Refuse to continue when a mean is not finite."""
    values = torch.stack(list(means.values())).tolist()
    bad = [name for name, value in zip(means, values, strict=True) if not math.isfinite(value)]
    if bad:
        raise FloatingPointError(
            f"iteration {get_args().curr_iteration + 1}: {', '.join(bad)} not finite. "
            f"Nothing was updated or saved in this step. {_REMEDY}"
        )


def _check_gradient(norm: float | None, iteration: int) -> None:
    """Refuse to continue when the gradient's norm is not finite. `norm`: None if Megatron itself skipped the step."""
    if norm is not None and not math.isfinite(norm):
        raise FloatingPointError(f"iteration {iteration}: the norm of the gradient is {norm}. {_REMEDY}")
