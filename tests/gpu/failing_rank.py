"""`megatron_fdd.distill` with an error only on the last rank, in step FDD_FAILS_AT, while the others wait for it."""

from __future__ import annotations

import os
import runpy
from typing import Any
from unittest.mock import patch

MESSAGE = "made to fail"


def main() -> None:
    from megatron_fdd.host import process as launch
    from megatron_fdd.host import rehearsal

    if rehearsal.is_wanted():
        rehearsal.start()
    import megatron.training.training as megatron_training

    is_last = os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)
    train_step, steps = megatron_training.train_step, 0

    def failing(*arguments: Any, **keywords: Any) -> Any:
        nonlocal steps
        steps += 1
        if is_last and steps == int(os.environ["FDD_FAILS_AT"]):
            raise ValueError(MESSAGE)
        return train_step(*arguments, **keywords)

    launch.PATIENCE_S = 1.0  # rank 0 does not meet the error
    with patch.object(megatron_training, "train_step", failing):
        runpy.run_module("megatron_fdd.distill", run_name="__main__")


if __name__ == "__main__":
    main()
