"""Calls of the real entry point, `megatron_fdd.distill.main()` with a command line, inside live ranks."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from tests.harness import forked_python
from tests.harness.rank_process import note
from tests.harness.ranks import IMAGE, Layout, clean_megatron, run_on_ranks

# Batch, schedule and optimizer of every toy run; a later flag overrides an earlier one.
COMMON = (
    "--use-checkpoint-args --seq-length 16 --micro-batch-size 2 --global-batch-size 8 --lr 3e-3 --lr-decay-iters 8 "
    "--lr-warmup-iters 2 --train-iters 3 --eval-interval 100 --eval-iters 0 --log-interval 1 --fdd-layers 2 "
    "--hidden-dropout 0 --attention-dropout 0 --seed 7"
).split()


@dataclass(frozen=True)
class Ending:
    """The result of one run of the entry point: exit status, and both output streams of this rank."""

    status: int
    out: str
    err: str


@dataclass(frozen=True)
class Patch:
    """The replacement of a module's `attribute` by `replacement`, both as names, so that they can be sent to ranks."""

    module: str
    attribute: str
    replacement: Any


def run_commands(
    commands: Sequence[Sequence[str]],
    patches: Sequence[Patch] = (),
    environment: dict[str, str] | None = None,
) -> list[Ending]:
    """Run, on every rank, the entry point once for each command line."""
    endings = []
    for index, command in enumerate(commands):
        if index:
            dist.barrier()
            clean_megatron()
        torch.manual_seed(0)
        with contextlib.ExitStack() as stack, patch.dict(os.environ, environment or {}):
            for each in patches:
                stack.enter_context(patch(f"{each.module}.{each.attribute}", each.replacement))
            endings.append(call_main(command))
        if endings[-1].status:
            note(f"ended its command {index} with status {endings[-1].status}: {endings[-1].err[-2000:]}")
    return endings


def call_main(command: Sequence[str]) -> Ending:
    """Run `python -m megatron_fdd.distill COMMAND` in this process, or `-m megatron_fdd.teach` for `teach ...`."""
    is_teach = command[:1] == ["teach"]
    program = importlib.import_module("megatron_fdd.teach.__main__" if is_teach else "megatron_fdd.distill")

    out, err = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", [program.__name__, *command[is_teach:]]),
        patch("megatron_fdd.host.process.PATIENCE_S", 0),  # no launcher: each rank reports its error
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        try:
            status = program.main()
        except SystemExit as end:  # --help, --exit-interval
            status = int(end.code or 0)
    return Ending(status, out.getvalue(), err.getvalue())


def run(
    *commands: Sequence[str],
    ranks: int = 2,
    patches: Sequence[Patch] = (),
    environment: dict[str, str] | None = None,
    image: str = IMAGE,
) -> list[list[Ending]]:
    """Run command lines one after the other on live ranks; return for each the endings of all ranks."""
    arguments = {"commands": [list(command) for command in commands], "patches": list(patches)}
    arguments["environment"] = environment
    by_rank = run_on_ranks(run_commands, Layout(ranks=ranks), arguments, image=image)
    return [list(endings) for endings in zip(*by_rank, strict=True)]


def trained(*commands: Sequence[str], **options: Any) -> list[list[Ending]]:
    """Run command lines as `run` does; every command must end well on every rank."""
    results = run(*commands, **options)
    for endings in results:
        for ending in endings:
            assert ending.status == 0, ending.err
    return results


def teach_by_transformers(*words: object) -> subprocess.CompletedProcess[str]:
    """Run `fdd teach --engine transformers` in a process of its own, which rehearses nothing."""
    return teach("transformers", *words)


def teach(engine: str, *words: object) -> subprocess.CompletedProcess[str]:
    """Run `fdd teach` with an engine of one process."""
    command = [forked_python.python(), "-m", "megatron_fdd.teach", "--engine", engine, *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "WORLD_SIZE": "1"}
    )


# What a metrics file measures with a clock.
TIMES = ("seconds", "data_seconds")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return every record of a metrics file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_seconds(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the part of the records that must not depend on interruptions."""
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records]
