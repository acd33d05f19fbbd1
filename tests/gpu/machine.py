"""The machine and the versions to which results belong. It fails if a GPU is wanted and none is visible."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks import lines
from benchmarks.measure import origin
from tests.gpu.knobs import commit


def more() -> str:
    """Return other facts worth knowing about the machine."""
    if not torch.cuda.is_available():
        return f"{torch.get_num_threads()} thread"
    free, total = (each / 2**30 for each in torch.cuda.mem_get_info())
    cuda, nccl = torch.version.cuda, ".".join(map(str, torch.cuda.nccl.version()))
    return f"{torch.cuda.device_count()} GPU of {total:.0f} GiB ({free:.0f} free), CUDA {cuda}, NCCL {nccl}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.machine", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--lines", type=Path, required=True)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: torch sees no GPU", file=sys.stderr)
        return 1
    record = {**origin(), "device": args.device, "more": more(), "commit": commit()}
    lines.write(args.lines, "machine", record)
    print(record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
