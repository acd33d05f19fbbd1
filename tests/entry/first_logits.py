"""The logits of a run's models before its first step, computed on a live rank."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from megatron.core.utils import unwrap_model
from megatron.training import training

from megatron_fdd import distill
from tests.convert import mcore, toys
from tests.entry.command import call_main
from tests.harness.ranks import clean_megatron


def first_logits(commands: list[list[str]]) -> list[list[torch.Tensor]]:
    """Return, on one rank, the logits of student and teacher of each run before its first step."""
    build, setup = distill.build_teacher, training.setup_model_and_optimizer
    found: list[torch.Tensor] = []

    def watched_build(*arguments: Any) -> torch.nn.Module:
        teacher = build(*arguments)
        found.append(mcore.logits(teacher, toys.TOKENS))
        return teacher

    def watched_setup(*arguments: Any, **keywords: Any) -> Any:
        result = setup(*arguments, **keywords)
        student = unwrap_model(result[0][0])
        found.append(mcore.logits(student, toys.TOKENS))
        student.train()
        return result

    runs = []
    for command in commands:
        found.clear()
        with (
            patch.object(distill, "build_teacher", watched_build),
            patch.object(training, "setup_model_and_optimizer", watched_setup),
        ):
            ending = call_main(command)
        assert ending.status == 0, ending.err
        runs.append(list(found))
        clean_megatron()
    return runs
