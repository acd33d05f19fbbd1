"""A checkpoint that cannot be written: what the system said, and what a run goes on from."""

from __future__ import annotations

from pathlib import Path

from megatron_fdd.saving import saved_iteration
from tests.entry.command import Patch, run
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
