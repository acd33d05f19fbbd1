"""Checks of the places that a run writes to: the metrics file and the folder of --save."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_fdd.plan.context import Context
from megatron_fdd.step.metrics import check_metrics_file


def check_metrics_place(context: Context) -> None:
    """Refuse a metrics file that cannot be written, or holds something else than metrics.

    Raises:
        ValueError: names the path and the obstacle.
    """
    _check_writable(context.config.metrics_file, "--fdd-metrics-file")
    check_metrics_file(context.config.metrics_file)


def check_save_place(context: Context) -> None:
    """Refuse a folder of --save in which files cannot be created. Create the folder.

    Raises:
        ValueError: names the path and the obstacle.
    """
    _check_writable(context.args.save, "--save")


def _check_writable(path: str | None, flag: str) -> None:
    """Refuse a path at which the file, or files in the folder, cannot be created. Create the folder."""
    if path is None:
        return
    if flag != "--save" and Path(path).is_dir():
        raise ValueError(f"{flag} {path}: is a folder; name a file in it")
    folder = Path(path) if flag == "--save" else Path(path).absolute().parent
    probe = folder / f".fdd-probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
        if flag != "--save":
            is_new = not Path(path).exists()
            with Path(path).open("a"):
                pass
            if is_new:  # a refused run leaves no file behind
                Path(path).unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"{flag} {path}: cannot be written ({error.strerror})") from error
