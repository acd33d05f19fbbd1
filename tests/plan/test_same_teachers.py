"""A run that goes on with another teacher than it had says so, whether the teacher runs or is stored."""

from __future__ import annotations

import argparse
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_fdd.config import FddConfig
from megatron_fdd.data.store.routed import NamedStore
from megatron_fdd.plan import same_teachers
from megatron_fdd.plan.context import Context, StoredModel
from megatron_fdd.plan.same_teachers import note_teachers
from megatron_fdd.step.teacher.lens_file import TeacherIdentity
from tests.data.store.made import IDENTITY, opened, write

LIVE = TeacherIdentity(IDENTITY.num_layers, IDENTITY.hidden_size, IDENTITY.final_norm)


class Runs:
    """Starts of one training, each from what the one before has saved."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._number = folder, 0
        self._saved: argparse.Namespace | None = None

    def start(self, *, live: str | None = None, flag: str = "--load", **stores: Any) -> list[str]:
        """Note the teachers of a start; return what it warns of.

        Args:
            live: folder of a teacher that runs.
            stores: changes of the identity of each stored teacher; `only` has no name.
        """
        args = argparse.Namespace(finetune=False, skip_train=False, rank=0)
        named = []
        for name, changes in stores.items():
            self._number += 1
            path = self._folder / f"S{self._number}"
            write(path, identity=replace(IDENTITY, **changes))
            named.append(NamedStore("" if name == "only" else name, opened(path)))
        stored = [
            None if given is None else StoredModel(folder, flag, Path(folder) / "iter_0000003", given)
            for folder, given in (("run", self._saved), (str(live), None if live is None else args))
        ]
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            note_teachers(
                Context(
                    FddConfig(),
                    args,
                    stored_student=stored[0],
                    stored_teacher=stored[1],
                    teacher_stores=tuple(named),
                )
            )
        self._saved = args
        return [str(each.message).replace(f"{self._folder}/", "") for each in found]


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


def test_the_same_teacher_goes_on(runs: Runs) -> None:
    """In another folder, another form, with other blocks."""
    assert runs.start(only={}) == []
    assert runs.start(only={"teacher": "moved", "form": "int8", "blocks": [6]}) == []


def test_another_stored_teacher_is_told(runs: Runs) -> None:
    """Its weights tell: a merged adapter changes no norm."""
    runs.start(only={})
    (line,) = runs.start(only={"weights": "99"})
    assert line.startswith(
        "--load run: the teacher was another one, S1, not S2. What the student learns changes"
    )


def test_weights_are_compared_where_both_ran_alike(runs: Runs) -> None:
    """Each engine and precision has a hash of its own."""
    runs.start(only={})
    assert runs.start(only={"engine": "transformers", "weights": "99"}) == []
    assert runs.start(only={"weights": "77", "ran": {"dtype": "float32"}}) == []
    assert len(runs.start(only={"engine": "vllm", "final_norm": "78ab"})) == 1


def test_a_teacher_that_runs_and_its_store(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The final norm tells them apart, as it does for a lens file; a checkpoint without weights has none."""
    norms = {"T": IDENTITY.final_norm, "U": "78ab", "empty": ""}
    monkeypatch.setattr(
        same_teachers.TeacherIdentity,
        "read",
        lambda path, _args: replace(LIVE, final_norm=norms[str(path.parent)]),
    )
    assert runs.start(only={}) == []
    assert runs.start(live="T") == []
    (line,) = runs.start(live="U")
    assert "the teacher was another one, T, not U." in line
    (line,) = runs.start(only={})
    assert "the teacher was another one, U, not S2." in line
    assert runs.start(live="empty") == []


def test_several_are_compared_by_their_names(runs: Runs) -> None:
    assert runs.start(code={}, maths={"weights": "99"}) == []
    assert runs.start(maths={"weights": "99"}, code={}) == []
    (line,) = runs.start(code={}, maths={})
    assert "the teacher maths was another one, S3, not S6." in line
    gone, new = runs.start(code={}, law={})
    assert "the teacher law is new; the run that saved it had code, maths." in gone
    assert "the teacher maths is gone; the run that saved it had code, maths." in new


@pytest.mark.parametrize("flag", ["--pretrained-checkpoint", "--load"])
def test_only_a_run_that_goes_on_is_compared(runs: Runs, flag: str) -> None:
    runs.start(only={})
    assert len(runs.start(flag=flag, only={"weights": "99"})) == (flag == "--load")


def test_a_checkpoint_of_an_older_version_is_taken(runs: Runs) -> None:
    runs.start(only={})
    assert runs._saved is not None
    del runs._saved.fdd_teachers
    assert runs.start(only={"weights": "99"}) == []
