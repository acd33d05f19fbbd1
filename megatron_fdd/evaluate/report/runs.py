"""The files that a run left behind: metrics, evaluation, and the arguments in its checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_fdd.evaluate.named_path import split_name
from megatron_fdd.evaluate.report.evaluation_file import read_evaluation
from megatron_fdd.evaluate.report.metrics import Metrics, read_metrics
from megatron_fdd.host.field_kinds import TEXT, Kind, either, list_of, optional, shown, whole, wrong_field

METRICS_FILE = "metrics.jsonl"
EVALUATION_FILE = "evaluation.json"
# The arguments of a checkpoint that the report does more with than show them.
_PATHS = optional(either(TEXT, list_of(TEXT)))
_FLAGS: Mapping[str, Kind] = {
    "train_iters": optional(whole(0, 10**15)),
    "train_data_path": _PATHS,
    "data_path": _PATHS,
}


@dataclass(frozen=True, slots=True)
class Run:
    """One column of the report. A `path` is None if no file of that kind was found.

    Attributes:
        number: position among the runs; it decides the colour.
        metrics: the losses and speeds over training.
        evaluation: scores of the exported model, as `fdd evaluate` writes them.
        flags: Megatron's arguments, as the newest checkpoint stores them; empty when unknown.
        remarks: what could not be read, to be shown in the report.
    """

    name: str
    number: int = 0
    metrics: Metrics | None = None
    metrics_path: Path | None = None
    evaluation: Mapping[str, Any] | None = None
    evaluation_path: Path | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


def read_runs(arguments: Sequence[str]) -> list[Run]:
    """Read each `[NAME=]PATH`.

    Arguments of the same name are parts of one run, such as its metrics and its evaluation.

    Raises:
        ValueError: a path has nothing to read, a file is malformed, or one name has two files of one kind.
    """
    runs: dict[str, Run] = {}
    for argument in arguments:
        name, path = named_run(argument)
        part = _read_part(name, path)
        runs[name] = _merge(runs[name], part) if name in runs else replace(part, number=len(runs))
    return list(runs.values())


def named_run(argument: str) -> tuple[str, Path]:
    """Return the name and the path of `NAME=PATH`, or of a path.

    Without a name, the name is the path's last folder. A file's own name is used unless it is the usual one, which
    tells nothing.
    """
    name, given = split_name(argument)
    path = Path(given).absolute()
    if not name and path.is_file():
        name = path.parent.name if path.name == METRICS_FILE else path.stem
    return name or path.name, Path(given)


def _read_part(name: str, path: Path) -> Run:
    if path.is_file():
        return Run(name, metrics=read_metrics(path), metrics_path=path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder; give another path")
    metrics_path, evaluation_path = path / METRICS_FILE, _find_evaluation(name, path)
    has_metrics = metrics_path.is_file()
    flags, remark = _read_flags(path)
    if not (has_metrics or evaluation_path or flags):
        raise ValueError(
            f"{path} holds neither {METRICS_FILE} nor {EVALUATION_FILE}"
            f"{f' ({remark})' if remark else ''}: name the folder or the file that a run gave to --fdd-metrics-file, "
            "or the folder that fdd evaluate wrote"
        )
    return Run(
        name=name,
        metrics=read_metrics(metrics_path) if has_metrics else None,
        metrics_path=metrics_path if has_metrics else None,
        evaluation=None if evaluation_path is None else read_evaluation(evaluation_path),
        evaluation_path=evaluation_path,
        flags=flags,
        remarks=(remark,) if remark else (),
    )


def _find_evaluation(name: str, folder: Path) -> Path | None:
    """Return the evaluation of a run; None without one.

    It is beside the metrics, or in `evaluation/`: there the one with the run's own name, or the only one.

    Raises:
        ValueError: there are several, and none has the run's name.
    """
    for candidate in (folder, folder / "evaluation", folder / "evaluation" / name):
        if (candidate / EVALUATION_FILE).is_file():
            return candidate / EVALUATION_FILE
    found = sorted(folder.glob(f"evaluation/*/{EVALUATION_FILE}"))
    if len(found) > 1:
        raise ValueError(
            f"{folder}/evaluation holds {len(found)} evaluations and none is called {name!r}: "
            f"name the run after one of {', '.join(file.parent.name for file in found)} (NAME={folder})"
        )
    return found[0] if found else None


def _read_flags(folder: Path) -> tuple[dict[str, Any], str | None]:
    """Return the arguments in the newest checkpoint of a `--save` folder, and what went wrong.

    No weights are read.
    """
    if not any(folder.glob("iter_*")) and not any(folder.glob("latest_checkpointed_*")):
        return {}, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about kernels, which are not needed to read arguments
        # Importing Megatron takes seconds, and a report of metrics alone does not need it.
        from megatron_fdd.host.checkpoint import find_checkpoint, has_checkpoint, read_checkpoint_args
        from megatron_fdd.host.model_fields import check_stored_args

        if not has_checkpoint(str(folder)):  # the first save has not ended
            return {}, None
        try:
            path = find_checkpoint(str(folder), "RUN")
            flags = vars(check_stored_args(read_checkpoint_args(path, "RUN"), f"RUN {path}"))
        except ValueError as error:
            return {}, str(error)
    found = wrong_field(flags, _FLAGS)
    if found is not None:
        return {}, f"RUN {path}: stores {found[0]} = {shown(found[1])}, which must be {found[2]}"
    return flags, None


def _merge(run: Run, part: Run) -> Run:
    for kind in ("metrics", "evaluation"):
        first, second = getattr(run, f"{kind}_path"), getattr(part, f"{kind}_path")
        if first and second and first.resolve() != second.resolve():
            raise ValueError(
                f"{run.name!r} has {kind} at {first} and at {second}: give each run a name of its own, NAME=PATH"
            )
    return replace(
        run,
        metrics=run.metrics or part.metrics,
        metrics_path=run.metrics_path or part.metrics_path,
        evaluation=run.evaluation or part.evaluation,
        evaluation_path=run.evaluation_path or part.evaluation_path,
        flags=run.flags or part.flags,
        remarks=run.remarks + part.remarks,
    )
