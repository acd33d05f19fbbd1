"""A checkpoint that cannot be written: the error has the system's message and the checkpoint to continue from."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import CheckpointException

from megatron_fdd.host.file_sums import SUMS_FILE
from megatron_fdd.host.saving import heard_failures, saved_iteration
from tests.entry.command import Patch, read_metrics, run
from tests.entry.conftest import Toys

WRITER = "megatron.core.dist_checkpointing.strategies.filesystem_async"


def full_disk(*_arguments: object, **_keywords: object) -> None:
    raise OSError(28, "No space left on device")


def test_the_systems_reason_is_heard_on_every_rank(toy: Toys, tmp_path: Path) -> None:
    command = toy.saving_command(tmp_path)
    [endings] = run(command, patches=[Patch(WRITER, "_write_item", full_disk)])
    assert [ending.status for ending in endings] == [1, 1]
    line = endings[0].err.splitlines()[-1]
    assert line.startswith(
        f"megatron_fdd: error: --save {tmp_path}: the checkpoint of iteration 2 could not be written: "
    )
    assert "[Errno 28] No space left on device (" in line
    assert "MiB free there" in line
    assert line.endswith("the last whole checkpoint (there is none yet)")
    assert "rank 1: megatron_fdd: error: --save" in endings[1].err


def test_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    found = [saved_iteration(None), saved_iteration(str(tmp_path))]
    for text in ("release", "12\n"):
        tracker.write_text(text)
        found.append(saved_iteration(str(tmp_path)))
    assert found == [None, None, None, 12]


def test_a_lost_connection_is_no_fault_of_the_disk(tmp_path: Path) -> None:
    lost = [
        RuntimeError(
            "[../gloo/transport/tcp/pair.cc:547] Read error [127.0.0.1]:51: Connection reset by peer"
        ),
        RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:17"),
        torch.distributed.DistBackendError("NCCL error in: NCCLUtils.hpp:133, remote process exited"),
        torch.distributed.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed"),
    ]
    for error in lost:
        with pytest.raises(ValueError, match="another rank ended while the checkpoint of iteration 4 was"):
            fail_to_write(tmp_path, error)
        with pytest.raises(ValueError, match="another rank ended while"):
            fail_to_write(tmp_path, CheckpointException("", {1: (error, None)}))
    for error in (ConnectionResetError("Connection reset by peer"), RuntimeError("unexpected pos 64 vs 3")):
        with pytest.raises(ValueError, match="could not be written: .* MiB free there"):
            fail_to_write(tmp_path, error)


def fail_to_write(folder: Path, error: BaseException) -> None:
    with heard_failures(str(folder), 4):
        raise error


def test_a_save_in_the_background_has_sums_and_the_next_run_compares_them(toy: Toys, tmp_path: Path) -> None:
    start = toy.saving_command(tmp_path, "--train-iters", 4, "--async-save")
    resume = toy.saving_command(tmp_path, "--train-iters", 4, "--load", tmp_path, "--ckpt-step", 2)
    first, second = run(start, resume)
    assert [ending.status for ending in [*first, *second]] == [0] * 4, second[0].err
    for iteration in (2, 4):
        sums = json.loads((tmp_path / f"iter_{iteration:07d}" / SUMS_FILE).read_text())["files"]
        assert {"__0_0.distcp", "__1_0.distcp", ".metadata"} <= set(sums)
    assert "B of checkpoints are right" in second[0].out
    assert [record["iteration"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert [int(step) for step in re.findall(r" iteration +(\d+)/", second[1].out)] == [3, 4]
