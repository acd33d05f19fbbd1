"""Around Megatron's schedule and its log: the three names of `megatron.training.training` that we replace.

`installed` replaces them while a run trains (`megatron_fdd.patches` lists all that is replaced, here and elsewhere).
Everything else of the training loop is Megatron's own.
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

from megatron_fdd.metrics import MetricsFile, step_means
from megatron_fdd.objective import StepScale
from megatron_fdd.patches import replaced
from megatron_fdd.pipeline import PipelineSteps
from megatron_fdd.sampling import EVERYTHING, Sampler
from megatron_fdd.student import StudentStep
from megatron_fdd.topology import Topology


class DistillationSteps:
    """What happens before and after each call of a schedule, and at each log line.

    Args:
        pipeline: what several stages add; None with one.
        sampler: draws what a training step looks at; an evaluation looks at everything.
        iteration: how many steps have been done.
    """

    def __init__(
        self,
        step: StudentStep,
        topology: Topology,
        pipeline: PipelineSteps | None,
        sampler: Sampler,
        iteration: Callable[[], int] = lambda: 0,
    ) -> None:
        self._step = step
        self._topology = topology
        self._pipeline = pipeline
        self._sampler = sampler
        self._iteration = iteration
        self._metrics_path: str | None = None
        self._stop_at_nan = True
        self._metrics_file: MetricsFile | None = None
        self._label_tokens: Tensor | None = None
        self._evaluation: dict[str, Tensor] = {}
        self._started_s = 0.0

    @property
    def forward_step(self) -> StudentStep:
        """Megatron's `forward_step_func`."""
        return self._step

    def report(self, metrics_path: str | None, *, stop_at_nan: bool) -> None:
        """Say what to do with the results.

        Args:
            metrics_path: file for one JSON object per iteration; None on ranks that do not write it.
            stop_at_nan: look at every step's loss before the optimizer does (one host synchronisation).
        """
        self._metrics_path, self._stop_at_nan = metrics_path, stop_at_nan

    def run(self, schedule: Callable[..., list[dict]], **keywords: Any) -> list[dict[str, Tensor]]:
        """Run one step's micro-batches; returns what Megatron logs.

        Collectives: those of `PipelineSteps.prepare`; one all-reduce of the token counts where two kinds of
        tokens are in use; the schedule's; those of `step_means`.

        Raises:
            FloatingPointError: the loss is not finite; on every rank, before the optimizer sees the gradients.
        """
        self._started_s = time.perf_counter()
        lens, ratio = None, 1.0
        if self._pipeline is not None or self._step.objective.config.tokens == "all":
            # What comes before the first gradient needs all of the step's batches.
            batches, keywords["data_iterator"] = _read_ahead(**keywords)
            ratio = self._label_per_term_token(batches)
            if "cu_seqlens" in batches[0]:  # packed: a micro-batch is one row
                keywords["seq_length"] *= keywords["micro_batch_size"]
                keywords["micro_batch_size"] = 1
            if self._pipeline is not None:
                lens = self._pipeline.prepare(batches, keywords["seq_length"], keywords["micro_batch_size"])
                keywords |= self._pipeline.schedule_keywords(keywords["seq_length"])
        iteration = self._iteration()
        inner = self._step.objective.config.weight_scale(iteration)
        draw = EVERYTHING if keywords.get("forward_only") else self._sampler.draw(iteration)
        self._step.begin_step(StepScale(inner, ratio, draw), lens)
        dicts = schedule(**keywords)
        if keywords.get("collect_non_loss_data"):
            return dicts
        self._label_tokens, means = step_means(self._step.objective, self._step.take_sums(), self._topology)
        if self._stop_at_nan and not keywords.get("forward_only"):
            _check_finite(means)
        if not self._topology.is_last_stage:
            return []
        if keywords.get("forward_only"):
            # Megatron's evaluation weighs steps by the second element.
            weighted = {
                name: torch.stack([mean * self._label_tokens, self._label_tokens])
                for name, mean in means.items()
                if not name.startswith("share ")
            }
            self._evaluation = {name: pair + self._evaluation.get(name, 0) for name, pair in weighted.items()}
            return [weighted]
        return [means]

    def log(self, bound: inspect.BoundArguments) -> None:
        """Append the iteration to the metrics file; called with the arguments of Megatron's `training_log`.

        Raises:
            FloatingPointError: the gradient is not finite; on every rank, before a checkpoint is written.
        """
        values = bound.arguments
        if self._stop_at_nan:
            _check_gradient(values["grad_norm"], values["iteration"])
        if self._metrics_path is None or not values["loss_dict"]:
            return
        iteration = values["iteration"]
        if self._metrics_file is None:
            self._metrics_file = MetricsFile(self._metrics_path, iteration)
        assert self._label_tokens is not None
        names = list(values["loss_dict"])
        numbers = torch.stack([self._label_tokens, *(values["loss_dict"][name] for name in names)]).tolist()
        record: dict[str, float | None] = {"tokens": int(numbers[0])}
        record |= dict.fromkeys(("total", "ce", "kd", "trajectory", "delta"))
        measured = self._step.objective.measured
        record |= {name: measured(name, value) for name, value in zip(names, numbers[1:], strict=True)}
        grad_norm = values["grad_norm"]
        record["grad_norm"] = None if grad_norm is None else float(grad_norm)
        record["seconds"] = round(time.perf_counter() - self._started_s, 4)
        self._metrics_file.write(iteration, record)

    def log_evaluation(self, bound: inspect.BoundArguments) -> None:
        """Append the validation's means; called with the arguments of Megatron's `evaluate_and_print_results`."""
        sums, self._evaluation = self._evaluation, {}
        # Megatron gives each evaluation a title, and nothing else tells what it was on.
        if self._metrics_file is None or not sums or "test set" in bound.arguments["prefix"]:
            return
        means = torch.stack([total / tokens.clamp(min=1) for total, tokens in sums.values()]).tolist()
        names = [f"valid {name}" for name in sums]
        self._metrics_file.write(bound.arguments["iteration"], dict(zip(names, means, strict=True)))

    def _label_per_term_token(self, batches: list[dict[str, Tensor]]) -> float:
        """Global ratio of the two token counts. Collectives: one all-reduce of them, where they differ."""
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
    """The step's batches, and iterators over them in place of Megatron's (one per chunk with virtual stages)."""
    if not isinstance(data_iterator, list):
        batches = [next(data_iterator) for _ in range(num_microbatches)]
        return batches, iter(batches)
    # Every chunk has a loader of its own over the same samples; all must move on alike.
    by_chunk = [[next(iterator) for _ in range(num_microbatches)] for iterator in data_iterator]
    return by_chunk[0], [iter(batches) for batches in by_chunk]


_REMEDY = "Lower --lr or raise --lr-warmup-iters, look at the data of this step, or continue from the last checkpoint"


@contextmanager
def installed(steps: DistillationSteps) -> Iterator[None]:
    """Replace Megatron's schedule lookup (training and evaluation) and its two log functions, for a block."""
    original_lookup = megatron_training.get_forward_backward_func
    original_log = megatron_training.training_log
    original_evaluation = megatron_training.evaluate_and_print_results
    signature, evaluation_signature = inspect.signature(original_log), inspect.signature(original_evaluation)

    def lookup(*args: Any, **keywords: Any) -> Callable[..., list[dict]]:
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
    }
    with replaced(stand_ins):
        yield


def _check_finite(means: dict[str, Tensor]) -> None:
    values = torch.stack(list(means.values())).tolist()
    bad = [name for name, value in zip(means, values, strict=True) if not math.isfinite(value)]
    if bad:
        raise FloatingPointError(
            f"iteration {get_args().curr_iteration + 1}: {', '.join(bad)} not finite. "
            f"Nothing was updated or saved in this step. {_REMEDY}"
        )


def _check_gradient(norm: float | None, iteration: int) -> None:
    """`norm` is None where Megatron skipped the step itself (loss scaling)."""
    if norm is not None and not math.isfinite(norm):
        raise FloatingPointError(f"iteration {iteration}: the norm of the gradient is {norm}. {_REMEDY}")
