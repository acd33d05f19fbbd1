"""The sections of `tests/gpu/multi.sh`, and the one file to send. Never run on GPUs."""

from __future__ import annotations

import os
import sys
import tarfile
from pathlib import Path

from tests.gpu.run import PYTHON, conduct
from tests.gpu.sections import Section

NEVER_RUN = "Several GPUs (this script was written on CPUs; before this run no GPU had seen it)"
SENT = "results.tar.gz"


def sections(device: str, lines: Path, has_te: bool) -> list[Section]:
    """Layouts of 2, 4 and 8 ranks as far as there are GPUs, then trainings on at most 4."""
    count = num_ranks(device)
    missing = f"{count} GPU: this needs at least 2" if count < 2 else ""
    common = ("--device", device, "--lines", str(lines))
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
    # On CPUs together: each waits much for its own processes.
    return [*found, Section("trainings", trainings, 900, least_s=60, missing=missing, beside=device == "cpu")]


def num_ranks(device: str) -> int:
    """GPUs that are used; two processes on a CPU."""
    if device == "cpu":
        return 2
    if os.environ["GPUS"]:
        return int(os.environ["GPUS"])
    import torch

    return torch.cuda.device_count()


def pack(out: Path) -> Path:
    """Everything that is worth sending, in one file."""
    path = out / SENT
    with tarfile.open(path, "w:gz") as archive:
        for name in ("results.md", "results.jsonl", "log.txt"):
            if (out / name).exists():
                archive.add(out / name, name)
    return path


def main() -> int:
    """Returns the exit status: 0 where everything that could run has passed."""
    out = Path(os.environ["OUT"])
    try:
        return 0 if conduct(NEVER_RUN, sections) else 1
    finally:
        out.mkdir(parents=True, exist_ok=True)
        print(f"send this file: {pack(out)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
