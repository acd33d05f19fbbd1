"""The sections of `tests/gpu/multi.sh`, and the single file with its results. It has never run on GPUs."""

from __future__ import annotations

import sys
import tarfile
from pathlib import Path

from tests.gpu.knobs import Knobs
from tests.gpu.run import PYTHON, main
from tests.gpu.sections import Section

NEVER_RUN = "Several GPUs (this script was written on CPUs; before this run no GPU had seen it)"
SENT = "results.tar.gz"


def sections(knobs: Knobs, results: Path, has_te: bool) -> list[Section]:
    """Return the sections: layouts of 2, 4 and 8 ranks as far as there are GPUs, then trainings on at most 4."""
    count = num_ranks(knobs)
    missing = f"{count} GPU: this needs at least 2" if count < 2 else ""
    common = ("--device", knobs.device, "--lines", str(results))
    found = [
        Section(
            f"layouts-of-{ranks}",
            (*PYTHON, "tests.gpu.layouts", *common, "--ranks", str(ranks)),
            600,
            least_s=30,
            missing=missing,
        )
        for ranks in (2, 4, 8)
        if ranks <= max(count, 2)
    ]
    trainings = (*PYTHON, "tests.gpu.trainings", *common, "--ranks", str(4 if count >= 4 else 2))
    # On CPUs they run together, because each often waits for its own processes.
    return [
        *found,
        Section("trainings", trainings, 900, least_s=60, missing=missing, beside=knobs.device == "cpu"),
    ]


def num_ranks(knobs: Knobs) -> int:
    """Return the number of GPUs to use, or of processes on a CPU, which is two."""
    if knobs.device == "cpu":
        return 2
    if knobs.gpus is not None:
        return knobs.gpus
    import torch

    return torch.cuda.device_count()


def pack(out: Path) -> None:
    """Pack everything worth sending into one file."""
    path = out / SENT
    with tarfile.open(path, "w:gz") as archive:
        for name in ("results.md", "results.jsonl", "log.txt"):
            if (out / name).exists():
                archive.add(out / name, name)
    print(f"send this file: {path}", flush=True)


if __name__ == "__main__":
    sys.exit(main(NEVER_RUN, sections, pack))
