"""The start of a training that follows a stream: it is refused before it writes or removes anything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_fdd.config import FddConfig
from megatron_fdd.data.stream.folder import ReplicaFolder
from megatron_fdd.data.stream.sign import Sign, read_sign
from megatron_fdd.step.teacher import provider
from megatron_fdd.step.teacher.followed import FollowedStream
from tests.data.store.made import opened
from tests.data.stream.made import stream


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_fdd.data.stream.sign.BEAT_S", 0.02)


def place(replica: int, count: int) -> Any:
    """Return the first rank of a data-parallel replica."""
    dp = SimpleNamespace(rank=lambda: replica, size=lambda: count)
    context = SimpleNamespace(rank=lambda: 0)
    return SimpleNamespace(
        collection=SimpleNamespace(dp=dp), tensor_rank=0, stage=0, context_group=context, context_size=1
    )


def followed(path: Path, count: int) -> FollowedStream:
    args: Any = SimpleNamespace(
        micro_batch_size=1,
        global_batch_size=count,
        data_parallel_size=count,
        num_workers=0,
        seq_length=8,
        save=None,
        sequence_parallel=False,
    )
    config = FddConfig(teacher_store=(("", str(path)),), teacher_follow=True)
    found = FollowedStream.of(opened(path), args, config)
    assert found is not None
    return found


@pytest.mark.parametrize("replica", [0, 2])
def test_a_refused_training_with_fewer_replicas_removes_nothing(tmp_path: Path, replica: int) -> None:
    """One sign of life is enough: those of a training's replicas need not change in the same moment."""
    stream(tmp_path)
    last = ReplicaFolder(tmp_path, 2)
    last.write_ask(0, "0" * 32, b"an ask")
    sign = Sign(ReplicaFolder(tmp_path, replica).student, state="running")
    second = followed(tmp_path, 1)
    with pytest.raises(
        ValueError, match=rf"another training follows this stream \(.*/{replica}/student.json"
    ):
        second.open(place(0, 1), 1)
    sign.close()
    second.end(is_over=False)
    assert last.listing().asks == {"0" * 32: 0}
    assert sign_state(ReplicaFolder(tmp_path, replica)) == "running"


def test_former_replicas_lose_what_they_have(tmp_path: Path) -> None:
    stream(tmp_path)
    former = ReplicaFolder(tmp_path, 2)  # and there is no folder of the second yet
    former.write_ask(0, "0" * 32, b"an ask")
    Sign(former.student, state="running").close()
    own = followed(tmp_path, 2)
    own.open(place(0, 2), 1)
    assert former.student.exists()
    own.join(place(0, 2))
    assert former.listing().asks == {}
    assert not former.student.exists()
    own.end(is_over=True)
    assert sign_state(ReplicaFolder(tmp_path, 0)) == "ended"


def test_a_training_that_another_rank_refuses_leaves_no_sign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Producers of the training that goes on would wait for it, too."""

    @contextmanager
    def refused() -> Iterator[None]:
        yield
        raise ValueError("another training follows this stream")

    stream(tmp_path)
    second = followed(tmp_path, 2)
    monkeypatch.setattr(provider, "together", refused)
    monkeypatch.setattr(provider.Topology, "from_megatron", lambda **_: place(1, 2))
    args: Any = SimpleNamespace(sequence_parallel=False)
    provide = provider.FeatureProvider(lambda *_, **__: [None], [], args, second)
    with pytest.raises(ValueError, match="another training follows"):
        provide([8])
    second.end(is_over=False)
    assert not ReplicaFolder(tmp_path, 1).path.exists()


def sign_state(folder: ReplicaFolder) -> Any:
    return (read_sign(folder.student) or {}).get("state")
