"""Additions to Megatron's saving: weights that are finite, why it failed, sums of the files, a line for people."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import megatron.training.checkpointing as megatron_checkpointing
import megatron.training.training as megatron_training
import torch
from megatron.training import get_args

from megatron_fdd.host.checkpoint import iteration_folder
from megatron_fdd.host.file_sums import mark_unfinished, write_sums
from megatron_fdd.host.saving import heard_failures
from megatron_fdd.step.finite import check_weights_finite


class Saves:
    """The stand-ins for two functions of Megatron, which they call.

    Args:
        begin: called when a save begins; returns what is called when the checkpoint is whole.
        report: gets the iteration and the seconds that its save took.
    """

    def __init__(self, begin: Callable[[], Callable[[], None]], report: Callable[[int, float], None]) -> None:
        self._begin, self._report = begin, report
        self._end: Callable[[], None] | None = None
        self._save = megatron_training.save_checkpoint
        self._schedule = megatron_checkpointing.schedule_async_save
        self._folder: Path | None = None

    def save_checkpoint(
        self, iteration: int, model: list[torch.nn.Module], optimizer: Any, *args: Any, **keywords: Any
    ) -> None:
        """Save, as Megatron's function of this name.

        Collectives: its own, and those of `check_weights_finite` and `write_sums`.

        Raises:
            FloatingPointError: the weights or the optimizer's moments are not finite.
            ValueError: the checkpoint could not be written; names the folder, the cause and how to continue.
        """
        started_s = time.perf_counter()
        check_weights_finite(model, optimizer, iteration)
        options = get_args()
        if keywords.get("non_persistent_ckpt", False):  # in another folder, for the next start alone
            self._folder = None
            self._save(iteration, model, optimizer, *args, **keywords)
            return
        self._folder = iteration_folder(options.save, iteration)
        self._end = self._begin()
        with heard_failures(options.save, iteration):
            if torch.distributed.get_rank() == 0:
                mark_unfinished(self._folder)
            self._save(iteration, model, optimizer, *args, **keywords)
            if not options.async_save:
                write_sums(self._folder)
                self._end()
        self._report(iteration, time.perf_counter() - started_s)

    def schedule_async_save(self, request: Any) -> None:
        """Start a save in the background, as Megatron does; file sums are written when its files are there."""
        if self._folder is not None:
            request.add_finalize_fn(partial(write_sums, self._folder))
            if self._end is not None:
                request.add_finalize_fn(self._end)
        self._schedule(request)
