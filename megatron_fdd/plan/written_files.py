"""Checks of the places that a run writes to: the metrics file, and the folders of --save and of Megatron's writers."""

from __future__ import annotations

import os

from megatron_fdd.host.disk import check_folder, make_folder, regular_file, writing
from megatron_fdd.plan.context import Context
from megatron_fdd.step.metrics import check_metrics_file

# The folders that a run writes to, by their names in `args`.
_FOLDERS = ("save", "tensorboard_dir", "wandb_save_dir", "data_cache_path", "non_persistent_global_ckpt_dir")


def check_metrics_place(context: Context) -> None:
    """Refuse a metrics file that cannot be written, or holds something else than metrics.

    Raises:
        ValueError: names the path and the obstacle.
    """
    flag, path = "--fdd-metrics-file", context.config.metrics_file
    if path is None:
        return
    file = regular_file(flag, path)
    check_metrics_file(path)
    check_folder(flag, path, file.parent)
    # A new one is not made: other ranks look at the same time, and a refused run leaves no file behind.
    if file.exists():
        with writing(flag, path):
            file.open("a").close()


def check_folders(context: Context) -> None:
    """Refuse folders in which files cannot be created, on every rank alike, and the root.

    Only one rank writes to some of them, and the others would wait for it in vain.

    Raises:
        ValueError: names the path and the obstacle.
    """
    for flag, path in _folders(context):
        if os.path.realpath(path) == os.sep:
            raise ValueError(
                f"{flag} {path}: is the root of the file system (an unset variable before the slash?); name a folder"
            )
        check_folder(flag, path, path)


def make_folders(context: Context) -> None:
    """Make the folders that the run writes to, when nothing else is left to refuse: a refused run leaves none behind.

    Raises:
        ValueError: names the path and the obstacle.
    """
    for flag, path in _folders(context):
        make_folder(flag, path, path)
    if context.config.metrics_file is not None:
        flag, path = "--fdd-metrics-file", context.config.metrics_file
        make_folder(flag, path, regular_file(flag, path).parent)


def _folders(context: Context) -> list[tuple[str, str]]:
    """Return flag and value of each folder that is given."""
    given = [(f"--{name.replace('_', '-')}", getattr(context.args, name)) for name in _FOLDERS]
    return [(flag, path) for flag, path in given if path is not None]
