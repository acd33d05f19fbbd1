"""Checks of the places that a run writes to: the metrics file, and the folders of --save and of Megatron's writers."""

from __future__ import annotations

import os

from megatron_fdd.host.disk import make_folder, regular_file, writing
from megatron_fdd.plan.context import Context
from megatron_fdd.step.metrics import check_metrics_file

# The folders that a run writes to, by their names in `args`.
_FOLDERS = ("save", "tensorboard_dir", "wandb_save_dir", "data_cache_path", "non_persistent_global_ckpt_dir")


def check_metrics_place(context: Context) -> None:
    """Refuse a metrics file that cannot be written, or holds something else than metrics. Create its folder.

    Raises:
        ValueError: names the path and the obstacle.
    """
    flag, path = "--fdd-metrics-file", context.config.metrics_file
    if path is None:
        return
    file = regular_file(flag, path)
    check_metrics_file(path)
    make_folder(flag, path, file.parent)
    # A new one is not made: other ranks look at the same time, and a refused run leaves no file behind.
    if file.exists():
        with writing(flag, path):
            file.open("a").close()


def check_folders(context: Context) -> None:
    """Refuse folders in which files cannot be created, on every rank alike, and the root. Create the folders.

    Only one rank writes to some of them, and the others would wait for it in vain.

    Raises:
        ValueError: names the path and the obstacle.
    """
    for name in _FOLDERS:
        path, flag = getattr(context.args, name), f"--{name.replace('_', '-')}"
        if path is None:
            continue
        if os.path.realpath(path) == os.sep:
            raise ValueError(
                f"{flag} {path}: is the root of the file system (an unset variable before the slash?); name a folder"
            )
        make_folder(flag, path, path)
