"""Tasks of lm-evaluation-harness, the optional package lm_eval, in an evaluation."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from megatron_fdd.host.panics import panics_as_errors

# What lm_eval writes behind the name of a measure that no filter has changed, and of its standard error.
_NO_FILTER, _ERROR = ",none", "_stderr"


@dataclass(frozen=True, slots=True)
class HarnessTasks:
    """Which tasks are asked.

    Attributes:
        names: tasks or groups of tasks.
        folder: has the YAML files of the tasks; None for those that come with lm_eval.
    """

    names: tuple[str, ...] = ()
    folder: Path | None = None

    def check(self) -> None:
        """Refuse tasks that lm_eval does not know, before a model is loaded.

        Raises:
            ValueError: names the task, or says that lm_eval is not installed.
        """
        if not self.names:
            if self.folder is not None:
                raise ValueError(
                    f"--lm-eval-tasks {self.folder}: give --lm-eval with the names of its tasks too"
                )
            return
        if importlib.util.find_spec("lm_eval") is None:
            raise ValueError(
                f"--lm-eval {','.join(self.names)}: needs lm-evaluation-harness: pip install 'megatron_fdd[lm-eval]'"
            )
        unknown = [name for name in self.names if not _manager(self.folder).match_tasks([name])]
        if unknown:
            where = "lm_eval" if self.folder is None else f"--lm-eval-tasks {self.folder}"
            raise ValueError(f"--lm-eval {unknown[0]}: {where} has no task of this name; give another")

    def run(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int
    ) -> dict[str, Any]:
        """Ask a model all tasks, and return what `evaluation.json` holds of it.

        Raises:
            ValueError: a task's data cannot be read, or lm_eval refuses the task.
        """
        simple_evaluate = importlib.import_module("lm_eval").simple_evaluate
        wrapper = importlib.import_module("lm_eval.models.huggingface").HFLM
        try:
            asked = wrapper(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            with panics_as_errors():
                found = simple_evaluate(
                    asked, tasks=list(self.names), task_manager=_manager(self.folder), log_samples=False
                )
        except Exception as error:  # each task and each data set has errors of its own
            first, *_ = str(error).splitlines() or [""]
            raise ValueError(
                f"--lm-eval {','.join(self.names)}: lm_eval ended with {type(error).__name__}: {first}; try the task "
                "with lm_eval alone"
            ) from error
        return results_of(found)


def results_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of lm_eval's results that `evaluation.json` holds: measures that are finite, by task."""
    tasks: dict[str, Any] = {}
    for task, values in found["results"].items():
        higher = found.get("higher_is_better", {}).get(task) or {}
        measures = {}
        for key, value in values.items():
            name, _, filtered = key.partition(",")
            if not filtered or name.endswith(_ERROR) or not _is_number(value):
                continue
            error = values.get(f"{name}{_ERROR},{filtered}")
            measures[key.removesuffix(_NO_FILTER)] = {
                "value": value,
                "standard_error": error if _is_number(error) else None,
                "higher_is_better": higher.get(name),
            }
        count = found.get("n-samples", {}).get(task, {}).get("effective")
        shots = found.get("n-shot", {}).get(task)
        tasks[task] = {"num_examples": count, "num_shots": shots, "measures": measures}
    return {"version": found.get("lm_eval_version"), "tasks": tasks}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@cache
def _manager(folder: Path | None) -> Any:
    """Return lm_eval's index of tasks; that of its own thousands takes many seconds."""
    manager = importlib.import_module("lm_eval.tasks").TaskManager
    return manager(include_path=None if folder is None else str(folder), include_defaults=folder is None)
