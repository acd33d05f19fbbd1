"""The checkpoint of a run: it is an ordinary Megatron checkpoint without any trace of the teacher."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.entry.command import trained
from tests.entry.conftest import Toys

# This program runs where `megatron_fdd` cannot be imported, and reads what a stock Megatron would read first.
READ = """
import json, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "megatron_fdd":
            raise ImportError("megatron_fdd is not here")

sys.meta_path.insert(0, Blocker())
try:
    import megatron_fdd
except ImportError:
    pass
else:
    raise SystemExit("the blocker does not block")

import torch
from megatron.core import dist_checkpointing

store = torch.distributed.HashStore()
torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)


def describe(checkpoint):
    state = dist_checkpointing.load_common_state_dict(checkpoint)
    args = vars(state["args"])
    metadata = dist_checkpointing.load_tensors_metadata(checkpoint)
    weights = dist_checkpointing.load_plain_tensors(checkpoint)
    return {
        "types": sorted({f"{type(value).__module__}.{type(value).__qualname__}" for value in args.values()}),
        "fdd": {name: value for name, value in args.items() if "fdd" in name or name == "teacher_load"},
        "consumed": args["consumed_train_samples"],
        "iteration": state["iteration"],
        "shapes": {name: list(tensor.global_shape) for name, tensor in metadata.items()},
        "finite": {name: bool(torch.isfinite(weights[name]).all()) for name in metadata},
    }

json.dump([describe(checkpoint) for checkpoint in sys.argv[1:]], sys.stdout)
"""


def read_without_the_package(*checkpoints: Path) -> list[dict]:
    command = [sys.executable, "-I", "-W", "ignore", "-c", READ, *map(str, checkpoints)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_loads_where_the_package_cannot_be_imported(toy: Toys, tmp_path: Path) -> None:
    save = ("--save-interval", "3", "--use-distributed-optimizer")
    no_teacher = "--fdd-alpha 0 --fdd-beta 0 --fdd-kd-weight 0 --fdd-ce-weight 1".split()
    trained(
        toy.command(*save, "--save", tmp_path / "distilled", "--bf16"),
        toy.command(*save, "--save", tmp_path / "plain", *no_teacher),
    )
    folders = [tmp_path / name / "iter_0000003" for name in ("distilled", "plain")]
    distilled, plain = read_without_the_package(*folders)
    assert {name.split(".")[0] for name in distilled["types"]} <= {"builtins", "signal", "torch", "megatron"}
    assert distilled["fdd"]["fdd_alpha"] == 1.0
    assert distilled["consumed"] == 24
    assert distilled["iteration"] == 3
    assert all(distilled["finite"].values())
    assert distilled["shapes"] == plain["shapes"]
