"""The folder of --save, and its protection from other runs, whether these are finished or still running."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_fdd.host.checkpoint import RELEASE, has_checkpoint, is_same_folder, read_tracker
from megatron_fdd.host.disk import regular_file
from megatron_fdd.host.lock import TakenError, lock
from megatron_fdd.host.process import is_first_rank
from megatron_fdd.plan.context import Context

LOCK_FILE = "run.lock"


def check_nothing_lost(context: Context) -> None:
    """Refuse to begin at step 0 in a folder that holds a checkpoint: its tracker and its metrics would be lost.

    Raises:
        ValueError: names the folder, its content, and the ways to continue.
    """
    args = context.args
    if args.save is None or args.skip_train:
        return
    is_read = is_same_folder(args.load, args.save)
    if is_read and not args.finetune and has_checkpoint(args.save):
        return
    try:
        label = read_tracker(args.save)
    except ValueError as error:
        raise ValueError(f"--save {args.save}: {error}; or give another --save") from None
    if label is None:
        return
    content = "a converted model" if label == RELEASE else f"a checkpoint of iteration {label}"
    go_on = "leave --finetune out" if is_read else f"give --load {args.save}"
    raise ValueError(
        f"--save {args.save}: holds {content}, and this run would begin at step 0 and take its place. To go on from it "
        f"{go_on}; for a new run give another --save, or delete {args.save}"
    )


def check_models_kept(context: Context) -> None:
    """Refuse to save into the folder from which this run reads its teacher, or the model that its student starts from.

    The tracker there would name the student's checkpoints: the next start would take one of them for that model. And
    in the folder of non-persistent checkpoints, and in all below it, Megatron (0.19.2) removes all but one.

    Raises:
        ValueError: names both flags.
    """
    args = context.args
    if args.skip_train:
        return
    read = [
        ("--teacher-load", context.config.teacher_load),
        *(("--fdd-teacher-store", folder) for _, folder in context.config.teacher_store),
        ("--pretrained-checkpoint", args.pretrained_checkpoint),
    ]
    for flag, folder in read:
        if is_same_folder(folder, args.save):
            raise ValueError(
                f"--save {args.save}: is the folder of {flag}, and the next start would take this run's last "
                "checkpoint for the model there; give another --save"
            )
    emptied = args.non_persistent_global_ckpt_dir
    for flag, folder in [*read, ("--load", args.load), ("--save", args.save)]:
        if None not in (emptied, folder) and Path(folder).resolve().is_relative_to(Path(emptied).resolve()):
            raise ValueError(
                f"--non-persistent-global-ckpt-dir {emptied}: {flag} {folder} is in it, and Megatron removes every "
                "checkpoint in it but the newest; give a folder of its own"
            )


@contextmanager
def locked(folder: str | None) -> Iterator[None]:
    """Keep other runs out of `folder` during a `with` block, as far as `lock` does; rank 0 does it for all ranks.

    Raises:
        ValueError: another run is saving there.
    """
    if folder is None or not is_first_rank():
        yield
        return
    try:
        with lock(regular_file("--save", Path(folder) / LOCK_FILE)):
            yield
    except TakenError as error:
        raise ValueError(
            f"--save {folder}: another run saves there ({error}); give another --save, or wait for its end. "
            "If it was killed, end what is left of it"
        ) from error
