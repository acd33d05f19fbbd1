"""One training run of the real entry point with its steps measured, in a separate process.

Megatron's `train_step` is wrapped: it contains micro-batches from the data loader, teacher, student, losses,
backward pass, gradient clipping and optimizer, but not the log.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Barrier
from typing import Any, TextIO
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, mm_flop

from benchmarks import measure
from benchmarks.step_profile import marked, profiled
from megatron_fdd.host import rehearsal

WARM_UP_STEPS = 2
# Two steps are not timed: one measures memory, one counts flops.
WATCHED_STEPS = 2
# One step, because its events take seconds to sort.
PROFILED_STEPS = 1
# Products that torch's counter does not know.
IN_PLACE = {torch.ops.aten.addmm_: lambda _total, left, right, **_options: mm_flop(left, right)}


@dataclass(frozen=True, slots=True)
class Job:
    """A run to measure.

    Attributes:
        command: flags of `megatron_fdd.distill`, without a number of iterations.
        is_stock: true for Megatron's own cross-entropy, through the model's own head, in place of our objective.
        log: the file for what the run prints.
        is_profiled: true if one more step follows, under torch's profiler.
        turns: what the runs of one table wait at, if they take their measured steps by turns.
        turn: the number of this run among them.
    """

    command: tuple[str, ...]
    is_stock: bool
    repeats: int
    device: str
    log: Path
    is_profiled: bool = False
    turns: Barrier | None = None
    turn: int = 0

    @property
    def num_steps(self) -> int:
        """All steps of the run, timed or not."""
        return WARM_UP_STEPS + self.repeats + WATCHED_STEPS + PROFILED_STEPS * self.is_profiled


@dataclass(slots=True)
class Watched:
    """The measurements of a run's steps.

    Attributes:
        seconds: time of each timed step: process CPU time, on a GPU device time.
        peak_mib: the most memory during a step, beyond what is in use between steps.
        whole_mib: that and all tensors that exist between steps (weights, gradients, optimizer).
        flops: flops of matrix products in one step, counted as they ran; None on a GPU, where they are not counted.
        losses: the last step's terms; empty for stock Megatron.
        parts: seconds of each part of a step under the profiler (`step_profile.parts_of`); empty without a profile.
    """

    seconds: list[float] = field(default_factory=list)
    peak_mib: float = 0.0
    whole_mib: float = 0.0
    flops: int | None = None
    losses: dict[str, float] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=dict)


class StepWatch:
    """A stand-in for Megatron's `train_step` that measures it."""

    def __init__(self, train_step: Callable[..., Any], job: Job) -> None:
        self.watched = Watched()
        self._train_step = train_step
        self._job = job
        self._repeats, self._device = job.repeats, job.device
        self._num_steps = 0

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        step = partial(self._train_step, *arguments, **keywords)
        results: list[Any] = []
        timed = self._num_steps - WARM_UP_STEPS
        self._num_steps += 1
        if timed < 0:
            return step()
        if timed < self._repeats:
            clock = measure.device_seconds if self._device == "cuda" else measure.cpu_seconds
            with self._in_turn():
                self.watched.seconds.append(clock(lambda: results.append(step())))
        elif timed == self._repeats:
            with self._in_turn():
                self._watch_memory(lambda: results.append(step()))
        elif timed < self._repeats + WATCHED_STEPS:
            self._count_flops(lambda: results.append(step()))
        else:
            self.watched.parts = profiled(lambda: results.append(step()), self._device)
        return results[0]

    @contextlib.contextmanager
    def _in_turn(self) -> Iterator[None]:
        """Wait until the runs before this one have done their step, and afterwards for those after it."""
        turns = self._job.turns
        if turns is None:
            yield
            return
        for turn in range(turns.parties):
            turns.wait()
            if turn == self._job.turn:
                yield

    def _watch_memory(self, step: Callable[[], None]) -> None:
        gc.collect()
        held_mib = (torch.cuda.memory_allocated() if self._device == "cuda" else held_bytes()) / measure.MIB
        self.watched.peak_mib = measure.peak_of(step, self._device)
        self.watched.whole_mib = held_mib + self.watched.peak_mib

    def _count_flops(self, step: Callable[[], None]) -> None:
        if self._device == "cuda":
            step()
            return
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
            step()
        self.watched.flops = counter.get_total_flops()


def held_bytes() -> int:
    """Return the bytes of all tensors in host memory.

    The interpreter and its modules, which a GPU does not hold, are not included.
    """
    tensors = (each for each in gc.get_objects() if issubclass(type(each), Tensor))
    storages = [each.untyped_storage() for each in tensors if each.device.type == "cpu"]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def run_job(job: Job) -> Watched:
    """Train as the job says, and return the measurements.

    Raises:
        RuntimeError: the run failed; the message ends with what it printed last.
    """
    _be_one_rank()
    # As under torchrun: a data loader's workers cannot start in the way this process did.
    multiprocessing.set_start_method("fork", force=True)
    metrics = job.log.with_suffix(".metrics.jsonl")
    steps = str(job.num_steps)
    more = ("--train-iters", steps, "--lr-decay-iters", steps, "--fdd-metrics-file", str(metrics))
    with job.log.open("w") as log, _everything_into(log):
        if rehearsal.is_wanted():
            rehearsal.start()
        torch.set_num_threads(1)
        import megatron.training.training as megatron_training

        from megatron_fdd import distill

        watch = StepWatch(megatron_training.train_step, job)
        train = _train_stock if job.is_stock else distill.main
        with (
            patch.object(megatron_training, "train_step", watch),
            patch.object(sys, "argv", ["distill", *job.command, *more]),
            marked() if job.is_profiled else contextlib.nullcontext(),
        ):
            status = train()
    if status != 0:
        raise RuntimeError(f"a run ended with {status}:\n" + job.log.read_text()[-2000:])
    if not job.is_stock:
        last = json.loads(metrics.read_text().splitlines()[-1])
        watch.watched.losses = {
            name: last[name] for name in ("ce", "kd", "trajectory", "delta") if last[name]
        }
    return watch.watched


@contextlib.contextmanager
def _everything_into(file: TextIO) -> Iterator[None]:
    """Send everything that is printed or logged inside a `with` statement to a file.

    Log handlers remember the stream with which they were made, before or inside, so these streams are redirected
    too.
    """

    def redirect(stream: TextIO) -> None:
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setStream(stream)

    redirect(file)
    try:
        with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            yield
    finally:
        redirect(sys.stderr)


def _train_stock() -> int:
    """Run the same without anything of ours except the data and, on a CPU, the rehearsal."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_fdd.data.provider import train_valid_test_provider
    from megatron_fdd.host.model import build_config
    from megatron_fdd.host.patches.helpers import use_built_helpers
    from megatron_fdd.plan.run import prepare_run

    if rehearsal.is_wanted():
        sys.argv[1:] = rehearsal.add_flags(sys.argv[1:])
    args = prepare_run().args
    use_built_helpers()
    container = pretrain_cfg_container_from_args(args, build_config(args))
    pretrain(container, train_valid_test_provider, ModelType.encoder_or_decoder, _stock_step)
    return 0


def _stock_step(
    data_iterator: Iterator[dict[str, Tensor]], model: torch.nn.Module
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]]:
    """Run a forward step: Megatron's `forward_step_func` of a language model."""
    from megatron_fdd.data.batch import get_batch

    batch = get_batch(data_iterator, torch.cuda.current_device())
    output = model(batch.tokens_BS, batch.position_ids_BS, batch.attention_mask, labels=batch.labels_BS)

    def loss(loss_BS: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        total, count = (loss_BS * batch.loss_mask_BS).sum(), batch.loss_mask_BS.sum().int()
        return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}

    return output, loss


def make_checkpoint(
    folder: Path, architecture: Mapping[str, Any], log: Path, dtype: torch.dtype = torch.float32
) -> None:
    """Write a GPT with random weights as a Megatron checkpoint, unless the folder exists."""
    if folder.exists():
        return
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    with log.open("w") as file, _everything_into(file):
        from megatron_fdd.convert.mcore_model import build_model, complete_args
        from megatron_fdd.convert.ranks import conversion_ranks

        with conversion_ranks() as groups:
            from megatron_fdd.convert.mcore_checkpoint import save_model

            args = complete_args(architecture, dtype=dtype, vocabulary_divisor=128)
            model = build_model(args, groups)
            torch.manual_seed(0)
            for name, parameter in model.named_parameters():
                with torch.no_grad():
                    parameter.normal_(std=0.02)
                    if name.endswith("norm.weight"):
                        parameter.add_(1.0)
            unfinished.mkdir()
            values = {name: parameter.detach() for name, parameter in model.named_parameters()}
            save_model(unfinished, model, args, groups, list(values), lambda name: [values[name]])
    unfinished.rename(folder)


def _be_one_rank() -> None:
    """Set the environment that torchrun would give a single rank; port 0 lets the store choose."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
