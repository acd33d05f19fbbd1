"""The table of what the fuzzer runs."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.hostile import fuzz_files, fuzz_runs


@dataclass(frozen=True)
class Target:
    """One kind of input.

    Attributes:
        run: makes a changed input in a new folder, and reads it with the code of the tools.
        speed: how many cases belong into a batch, relative to others.
    """

    name: str
    run: Callable[[random.Random, Path], object]
    speed: float = 1


TARGETS = (
    Target("config", fuzz_files.config, 6),
    Target("import", fuzz_runs.imported, 0.2),
    Target("stored", fuzz_runs.stored_arguments, 1),
    Target("safetensors", fuzz_files.safetensors, 4),
    Target("lines", fuzz_files.lines, 1),
    Target("tokenizer", fuzz_files.tokenizer_files, 2),
    Target("set", fuzz_files.prepared_set, 6),
    Target("checkpoint", fuzz_runs.checkpoint, 2),
    Target("report", fuzz_files.report, 2),
    Target("resume", fuzz_files.resumed_metrics, 4),
    Target("answers", fuzz_files.answers, 4),
    Target("model", fuzz_files.evaluated_model, 2),
    Target("template", fuzz_files.template, 1),
    Target("flags", fuzz_runs.flags, 1),
    Target("trained", fuzz_runs.trained, 1),
    Target("export", fuzz_runs.exported, 0.2),
    Target("commands", fuzz_runs.commands, 1),
)
