"""The report of a step: means of every term, the share of each in the total, and the metrics file."""

from __future__ import annotations

import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from megatron.training import get_args
from torch import Tensor

from megatron_fdd.host.disk import regular_file, replacing, writing
from megatron_fdd.host.saving import last_whole_checkpoint
from megatron_fdd.host.topology import Topology
from megatron_fdd.losses.objective import COUNTS, Objective
from megatron_fdd.losses.terms import SHARE, TERMS

# The start of every record, and therefore of every file that may be cut back.
_RECORD_START = b'{"iteration": '
_LONGEST_RECORD = 2**20
_RECORD = re.compile(rb'\{"iteration": \d{1,15}[,}]')


def add_up(sums: Tensor, topology: Topology) -> Tensor:
    """Add up, in place, the packed sums (`Objective.packed_sums`) of all ranks; return them.

    Collectives: one all-reduce over the ranks whose rows differ; with several stages one more over the pipeline group.
    """
    torch.distributed.all_reduce(sums, group=topology.rows_group)
    if topology.num_stages > 1:
        torch.distributed.all_reduce(sums, group=topology.pipeline_group)
    return sums


class Report:
    """What the sums of a step say: the means of all teachers together, and of each of several by itself.

    Args:
        objectives: one for each teacher, of any chunk.
        teachers: their names; of the only one it is empty.
    """

    def __init__(self, objectives: Sequence[Objective], teachers: Sequence[str]) -> None:
        self._first = objectives[0]
        self._several = dict(zip(teachers, objectives, strict=True)) if len(objectives) > 1 else {}
        self._num_teachers = len(objectives)
        # Layers of several teachers have a common mean where they are compared with the same layers of the student.
        self._has_layers = len({tuple(part.name for part in each.parts) for each in objectives}) == 1

    @property
    def num_sums(self) -> int:
        """How many numbers the packed sums of all teachers are (`Objective.packed_sums`, one behind the other)."""
        return self._num_teachers * (len(COUNTS) + len(self._first.parts))

    def label_tokens(self, sums: Tensor) -> Tensor:
        """Return the number of tokens with a label, of all teachers together, 0-dim."""
        return self._by_teacher(sums)[:, 0].sum()

    def _by_teacher(self, sums: Tensor) -> Tensor:
        return sums.view(self._num_teachers, -1)

    def means(self, sums: Tensor) -> dict[str, Tensor]:
        """Return the means over tokens: `token_means` of all, and of each of several teachers over its own tokens.

        A teacher's names end with its own: "total code", "kd code", "trajectory s4:t9 code".
        """
        each = self._by_teacher(sums)
        means = token_means(self._first, each.sum(0))
        if not self._has_layers:
            layers = {part.name for part in self._first.parts if part.pair is not None}
            means = {name: mean for name, mean in means.items() if name not in layers}
        for number, (name, objective) in enumerate(self._several.items()):
            own = without_shares(token_means(objective, each[number]))
            means |= {f"{term} {name}": mean for term, mean in own.items()}
        return means

    def seen(self, sums: Tensor, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Leave out the means over no token, as of a teacher that was in no batch. One host synchronisation."""
        unseen = self._unseen(self._tokens(sums).tolist())
        return {name: mean for name, mean in means.items() if name not in unseen}

    def record(self, sums: Tensor, means: Mapping[str, Tensor]) -> dict[str, float | None]:
        """Return a step's numbers for the metrics file; None for a mean over no token. One host synchronisation.

        Args:
            means: what `means` gave for these sums.
        """
        tokens = self._tokens(sums)
        numbers = torch.cat([tokens.flatten(), torch.stack(list(means.values()))]).tolist()
        rows = [numbers[start : start + 2] for start in range(0, tokens.numel(), 2)]
        names = ["tokens", *(f"tokens {name}" for name in self._several)]
        record: dict[str, float | None] = {name: int(row[0]) for name, row in zip(names, rows, strict=True)}
        record |= dict.fromkeys(("total", *(term.kind for term in TERMS)))
        unseen = self._unseen(rows)
        for name, value in zip(means, numbers[tokens.numel() :], strict=True):
            record[name] = None if name in unseen else self._measured(name, value)
        return record

    def _tokens(self, sums: Tensor) -> Tensor:
        """Return the counts of tokens with a label and of the other terms' tokens: of all, then of each of several."""
        each = self._by_teacher(sums)[:, : len(COUNTS)]
        return torch.cat([each.sum(0, keepdim=True), each[: len(self._several)]])

    def _unseen(self, tokens: Sequence[Sequence[float]]) -> set[str]:
        """Return the names of the means over no token; `tokens` are the rows of `_tokens`."""
        owners = [("", self._first), *((f" {name}", own) for name, own in self._several.items())]
        return {
            f"{name}{end}"
            for (end, objective), row in zip(owners, tokens, strict=True)
            for name in objective.unseen(*row)
        }

    def _measured(self, name: str, value: float) -> float | None:
        """Return what a step saw of a mean (`Objective.measured`)."""
        for teacher, objective in self._several.items():
            if name.endswith(f" {teacher}"):
                return objective.measured(name.removesuffix(f" {teacher}"), value)
        return self._first.measured(name, value)


def token_means(objective: Objective, sums: Tensor) -> dict[str, Tensor]:
    """Compute the means over tokens, each term's over its own, and from them the total.

    Args:
        sums: packed as `Objective.packed_sums` does, of all ranks, of a step or of several steps of a validation.

    Returns:
        "total", the mean of each kind of term ("kd", "trajectory"), each layer's ("trajectory s4:t9"), and each kind's
        share of the total ("share kd"). 0-dim tensors; no host synchronisation. Without a token, a mean is 0.
    """
    label_tokens, term_tokens = sums[: len(COUNTS)]
    means: dict[str, Tensor] = {}
    groups: dict[str, list[Tensor]] = defaultdict(list)
    weighted: dict[str, list[Tensor]] = defaultdict(list)
    for part, value in zip(objective.parts, sums[len(COUNTS) :], strict=True):
        tokens = label_tokens if part.term.tokens == "labels" else term_tokens
        mean = means[part.name] = value / tokens.clamp(min=1)
        groups[part.term.kind].append(mean)
        weighted[part.term.kind].append(objective.weight_of(part) * mean)
    every = [value for values in weighted.values() for value in values]
    total = sum(every, start=torch.zeros_like(label_tokens))
    shares = {
        f"{SHARE}{kind}": torch.where(total > 0, torch.stack(values).sum() / total, 0.0)
        for kind, values in weighted.items()
    }
    of_kinds = {kind: torch.stack(values).mean() for kind, values in groups.items()}
    return {
        "total": total,
        **of_kinds,
        **{k: v for k, v in means.items() if k not in of_kinds},
        **shares,
    }


def without_shares(means: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return all but the shares: the step's own, which a validation and a line for people have not."""
    return {name: mean for name, mean in means.items() if not name.startswith(SHARE)}


def check_metrics_file(path: str | None) -> None:
    """Refuse a file that holds something else than metrics: a run would delete its content.

    Raises:
        ValueError: names the file and the line.
    """
    if path is None or not os.path.isfile(path):
        return
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST_RECORD), b""), 1):
            # A killed run may have left less than a record.
            is_part = not line.endswith(b"\n") and _RECORD_START.startswith(line[: len(_RECORD_START)])
            if not (_RECORD.match(line) or is_part):
                raise ValueError(
                    f"--fdd-metrics-file {path}: holds something else than metrics (line {number}), which would be "
                    "lost; give another name"
                )


class MetricsFile:
    """A file with one JSON object per iteration and one per validation, each written to disk immediately.

    A run that starts at iteration i drops the file's lines from i on: after a kill, the lines after the last
    checkpoint belong to steps that run again.

    Raises:
        ValueError: the file cannot be written; names it, and the checkpoint from which the same command goes on.
    """

    def __init__(self, path: str, first_iteration: int) -> None:
        self._path = regular_file("--fdd-metrics-file", path)
        with self._told():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._cut_back(first_iteration)

    def write(self, iteration: int, values: Mapping[str, float | None]) -> None:
        """Append one record. A value that is not finite is written as null: JSON has no NaN."""
        record = {"iteration": iteration} | {
            name: value if value is None or math.isfinite(value) else None for name, value in values.items()
        }
        with self._told(), self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            with writing("--fdd-metrics-file", self._path):
                yield
        except ValueError as error:
            last = last_whole_checkpoint(get_args().save)
            raise ValueError(f"{error}. The same command then goes on from {last}") from error

    def _cut_back(self, first_iteration: int) -> None:
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text().splitlines():
            try:
                iteration = int(json.loads(line)["iteration"])
            except (ValueError, TypeError, RecursionError):
                break  # a killed run may leave part of a line
            if iteration >= first_iteration:
                break
            kept.append(line + "\n")
        with replacing(self._path) as replacement:
            replacement.write_text("".join(kept))
