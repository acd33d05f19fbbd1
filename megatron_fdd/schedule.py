"""Around Megatron's schedule and its log: the two names of `megatron.training.training` that we replace.

Both patches are in `installed`. Everything else of the training loop is Megatron's own.
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
from torch.distributed import ProcessGroup

from megatron_fdd.metrics import MetricsFile, step_means
from megatron_fdd.objective import Objective, StepScale
from megatron_fdd.student import PACKED_KEY


class DistillationSteps:
    """What happens before and after each call of a schedule, and at each log line.

    Args:
        group: ranks whose token rows differ (data and context parallel; tensor parallel too under
            sequence parallelism).
        metrics_path: file for one JSON object per iteration; None on ranks that do not write it.
        stop_at_nan: look at every step's loss before the optimizer does (one host synchronisation).
    """

    def __init__(
        self, objective: Objective, group: ProcessGroup, metrics_path: str | None, *, stop_at_nan: bool
    ) -> None:
        self._objective = objective
        self._group = group
        self._metrics_path = metrics_path
        self._stop_at_nan = stop_at_nan
        self._metrics_file: MetricsFile | None = None
        self._label_tokens: Tensor | None = None
        self._started_s = 0.0

    def run(self, schedule: Callable[..., list[dict]], **keywords: Any) -> list[dict[str, Tensor]]:
        """Run one step's micro-batches; returns what Megatron logs.

        Collectives: one packed all-reduce over the group; one more before the schedule for the token counts
        where two kinds of tokens are in use.

        Raises:
            FloatingPointError: the loss is not finite; on every rank, before the optimizer sees the gradients.
        """
        self._started_s = time.perf_counter()
        ratio, keywords["data_iterator"] = self._label_per_term_token(
            keywords["data_iterator"], keywords["num_microbatches"]
        )
        inner = self._objective.config.weight_scale(getattr(get_args(), "curr_iteration", 0))
        self._objective.begin_step(StepScale(inner, ratio))
        dicts = schedule(**keywords)
        if keywords.get("collect_non_loss_data"):
            return dicts
        sums = torch.stack([entry[PACKED_KEY] for entry in dicts]).sum(0)
        self._label_tokens, means = step_means(self._objective, sums, self._group)
        if keywords.get("forward_only"):
            # Megatron's evaluation weighs steps by the second element.
            return [
                {
                    name: torch.stack([mean * self._label_tokens, self._label_tokens])
                    for name, mean in means.items()
                    if not name.startswith("share ")
                }
            ]
        if self._stop_at_nan:
            _check_finite(means)
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
        record |= dict(zip(names, numbers[1:], strict=True))
        grad_norm = values["grad_norm"]
        record["grad_norm"] = None if grad_norm is None else float(grad_norm)
        record["seconds"] = round(time.perf_counter() - self._started_s, 4)
        self._metrics_file.write(iteration, record)

    def _label_per_term_token(self, data_iterator: Any, num_microbatches: int) -> tuple[float, Any]:
        """Global ratio of the two token counts. Needs the whole step's batches before the first gradient."""
        if self._objective.config.tokens == "labels":
            return 1.0, data_iterator
        batches = [next(data_iterator) for _ in range(num_microbatches)]
        counts = torch.stack(
            [torch.stack([batch["loss_mask"].sum(), batch["token_mask"].sum()]).float() for batch in batches]
        ).sum(0)
        counts = counts.to(torch.cuda.current_device())
        torch.distributed.all_reduce(counts, group=self._group)
        label_tokens, term_tokens = counts.tolist()
        return label_tokens / max(term_tokens, 1.0), iter(batches)


_REMEDY = "Lower --lr or raise --lr-warmup-iters, look at the data of this step, or continue from the last checkpoint"


@contextmanager
def installed(steps: DistillationSteps) -> Iterator[None]:
    """Marked patches 1 and 2: Megatron's schedule lookup (training and evaluation) and its log function."""
    original_lookup = megatron_training.get_forward_backward_func
    original_log = megatron_training.training_log
    signature = inspect.signature(original_log)

    def lookup(*args: Any, **keywords: Any) -> Callable[..., list[dict]]:
        schedule = original_lookup(*args, **keywords)

        def run(**call: Any) -> list[dict[str, Tensor]]:
            return steps.run(schedule, **call)

        return run

    def log(*args: Any, **keywords: Any) -> bool:
        steps.log(signature.bind(*args, **keywords))
        return original_log(*args, **keywords)

    megatron_training.get_forward_backward_func = lookup
    megatron_training.training_log = log
    try:
        yield
    finally:
        megatron_training.get_forward_backward_func = original_lookup
        megatron_training.training_log = original_log


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
