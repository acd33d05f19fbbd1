"""The means of a validation: each term's over its own tokens, of all steps and ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_fdd.host.topology import Topology
from megatron_fdd.step.metrics import Report, without_shares

# Means, what `process_non_loss_data_func` collected, whether time ran out.
Evaluation = tuple[dict[str, Tensor] | None, Any, bool]


class Validation:
    """The packed sums (`Objective.packed_sums`) of the validation under way, for each of its sets.

    Megatron would weigh all terms of a step by one count of tokens; terms have two (`--fdd-tokens all`).
    """

    def __init__(self, report: Report, topology: Topology) -> None:
        self._report = report
        self._topology = topology
        self._sets: list[Tensor] = []

    def evaluate(self, original: Callable[..., Evaluation], *args: Any, **keywords: Any) -> Evaluation:
        """Run Megatron's `evaluate` on one set, whose steps call `add`; return what it returns, with our means."""
        num = self._report.num_sums
        self._sets.append(torch.zeros(num, dtype=torch.float64, device=torch.cuda.current_device()))
        _, collected, is_cut_short = original(*args, **keywords)
        if is_cut_short:  # by --exit-duration-in-mins: no mean of a part of the data
            self._sets.clear()
            return None, collected, True
        return self._means(self._sets[-1]) if self._topology.is_last_stage else {}, collected, False

    def add(self, sums: Tensor) -> None:
        """Add the packed sums of a step, which are those of all ranks."""
        self._sets[-1] += sums

    def take_means(self) -> dict[str, Tensor]:
        """Return the means over all sets, and forget them; empty if there was no validation."""
        sets, self._sets = self._sets, []
        return self._means(torch.stack(sets).sum(0)) if sets else {}

    def _means(self, sums: Tensor) -> dict[str, Tensor]:
        return without_shares(self._report.seen(sums, self._report.means(sums)))
