"""The export of every checkpoint of a running training, each as soon as it is whole."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from megatron_fdd.convert.ranks import conversion_ranks
from megatron_fdd.convert.to_hf import Exported, ExportOptions, mcore_to_hf
from megatron_fdd.host.disk import explain, make_folder
from megatron_fdd.host.together import together

# Seconds between two looks at the folder.
_PAUSE_S = 2.0


def watch(
    load: Path,
    hf_out: Path,
    idle_s: float,
    tell: Callable[[Path, Exported], None],
    options: ExportOptions,
) -> str:
    """Export each checkpoint of a training's folder to `hf_out/iter_NNNNNNN`, until there will be no more.

    A checkpoint is taken when its save has ended. What is exported already is skipped, so an interrupted watch goes on
    where it was. One that cannot be exported, or that the training removes meanwhile, is named on stderr.

    Args:
        idle_s: how long to wait for a new checkpoint; the watch also ends after that of the training's last step.
        tell: called with each new folder, on every rank.
        options: of each export; `ckpt_step` is set here.

    Returns:
        For people: how many were exported, and why the watch has ended.

    Collectives: a broadcast and an all-gather every two seconds, and those of `mcore_to_hf`, over all ranks.

    Raises:
        ValueError: a checkpoint could not be exported; said when the watch has ended. The same on every rank.
    """
    with conversion_ranks():
        from megatron_fdd.convert.watched_folder import End, WatchedFolder  # imports Megatron
        from megatron_fdd.host.checkpoint import iteration_folder

        with together():
            make_folder("--hf-out", hf_out, hf_out)
        desk = WatchedFolder(load, hf_out, idle_s) if dist.get_rank() == 0 else None
        while True:
            told: list[int | End | None] = [None]
            with together():
                if desk is not None:
                    told = [desk.next_step()]
            dist.broadcast_object_list(told, src=0)
            step = told[0]
            if isinstance(step, End):
                break
            error = ""
            if step is not None:
                place = iteration_folder(hf_out, step)
                try:
                    of_step: ExportOptions = {**options, "ckpt_step": step}
                    tell(place, mcore_to_hf(load, place, **of_step))
                except (ValueError, OSError) as failure:
                    error = explain(failure)
                if desk is not None:
                    desk.note(step, error)
            if step is None or error:
                time.sleep(_PAUSE_S)
    if step.is_failure:
        raise ValueError(step.line)
    return step.line
