"""The entry point on one batch again and again, with constant weights: how a step's draw changes its result.

    torchrun --nproc-per-node 1 -m benchmarks.repeated_batch OUT [flags of megatron_fdd.distill]

writes the reported means of every step, and its gradient, to the file OUT.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from megatron_fdd.host import rehearsal

if __name__ == "__main__" and rehearsal.is_wanted():
    rehearsal.start()  # before Megatron looks for a GPU

from megatron_fdd import distill
from megatron_fdd.step.schedule import StepHooks

STAND_STILL = "--lr 0 --min-lr 0 --weight-decay 0 --clip-grad 0 --eval-iters 0 --eval-interval 100000".split()


def main() -> int:
    """Run the entry point; return its exit status."""
    out = sys.argv.pop(1)
    sys.argv += STAND_STILL
    means: list[dict[str, Tensor]] = []
    gradients: list[Tensor] = []
    batches: list[Any] = []
    real_run = StepHooks.run

    def run(self: StepHooks, schedule: Callable[..., list[dict]], **keywords: Any) -> list[dict]:
        for _ in range(keywords["num_microbatches"] - len(batches)):
            batches.append(next(keywords["data_iterator"]))
        result = real_run(self, schedule, **keywords | {"data_iterator": iter(batches)})
        means.extend(result)
        parts = [each.main_grad.flatten() for chunk in keywords["model"] for each in chunk.parameters()]
        gradients.append(torch.cat(parts).float().cpu().clone())
        return result

    with patch.object(StepHooks, "run", run):
        status = distill.main()
    torch.save({"means": means, "gradient_DP": torch.stack(gradients) if gradients else None}, out)
    return status


if __name__ == "__main__":
    sys.exit(main())
