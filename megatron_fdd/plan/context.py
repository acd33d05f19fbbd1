"""The state of knowledge about a run during planning: everything that a check may read."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_fdd.config import FddConfig
from megatron_fdd.data.store.routed import NamedStore
from megatron_fdd.host.checkpoint import RELEASE, find_checkpoint, read_checkpoint_args
from megatron_fdd.host.model_fields import check_stored_args
from megatron_fdd.host.role import Role
from megatron_fdd.losses.layer_plan import Plan
from megatron_fdd.step.teacher.stored import PlannedStore


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model's checkpoint, which was found and is complete.

    Attributes:
        folder: the folder, as the user gave it.
        flag: the flag that named it.
        path: the newest checkpoint in the folder.
        args: Megatron's arguments, as stored in it.
    """

    folder: str
    flag: str
    path: Path
    args: argparse.Namespace

    @classmethod
    def find(cls, folder: str, flag: str, *, to_plan: bool, step: int | None = None) -> StoredModel:
        """Look for the newest checkpoint in a folder, or that of iteration `step`, and read its arguments.

        Args:
            to_plan: whether the arguments are enough; the checkpoint may then lack weights. Otherwise its objects are
                left to `PreparedRun.check_files`.
            step: the value of --ckpt-step.

        Collectives: none.

        Raises:
            ValueError: there is no checkpoint, it is incomplete, or its arguments describe no model.
        """
        path = find_checkpoint(folder, flag, to_plan=to_plan, step=step, leaves_objects=not to_plan)
        args = check_stored_args(read_checkpoint_args(path, flag), f"{flag} {path}")
        return cls(folder, flag, path, args)


@dataclass(frozen=True, slots=True)
class Model:
    """One of the two models as this run builds it.

    Attributes:
        args: its architecture at this run's layout and precision; the student's are not validated yet.
        stored: the checkpoint of its weights; None for a student from scratch.
    """

    role: Role
    args: argparse.Namespace
    stored: StoredModel | None


@dataclass(frozen=True, slots=True)
class TeacherSize:
    """What the losses must know of a teacher, whether it runs or its features are stored."""

    num_layers: int
    hidden_size: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class KnownTeacher:
    """A teacher of the run, for checks and messages.

    Attributes:
        label: "the teacher", or "the teacher code" where names tell several apart.
        folder: of its checkpoint, or of its features; its tokenizer may lie in it.
    """

    label: str
    size: TeacherSize
    folder: str


@dataclass(frozen=True, slots=True)
class Context:
    """The knowledge of a phase of checks; a later phase knows more (`plan/checks.py` lists the phases).

    Attributes:
        args: the command line's arguments, which describe the student too; completed, forced and validated in place.
        stored_student: the checkpoint that the student starts from; None from scratch.
        stored_teacher: the teacher's checkpoint; None without a teacher.
        teacher_args: the teacher's arguments in this run.
        teacher_stores: the features of one teacher or several on disk, which take the place of both.
        plan: layer pairs, layers of every chunk, vocabulary; with several teachers the pairs of the first.
        planned_stores: each stored teacher with its own plan.
        id_holders: the number of ids of each holder of a vocabulary, by its name; none if no data of ours is read.
        checks_data: the datasets are ours; False where a training script brings its own.
    """

    config: FddConfig
    args: argparse.Namespace
    stored_student: StoredModel | None = None
    stored_teacher: StoredModel | None = None
    teacher_args: argparse.Namespace | None = None
    teacher_stores: tuple[NamedStore, ...] = ()
    plan: Plan | None = None
    planned_stores: tuple[PlannedStore, ...] = ()
    id_holders: Mapping[str, int] = field(default_factory=dict)
    checks_data: bool = True

    @property
    def resumes_optimizer(self) -> bool:
        """Whether the optimizer continues from the state in the student's checkpoint."""
        args, stored = self.args, self.stored_student
        if stored is None or stored.flag != "--load" or stored.path.name == RELEASE:
            return False
        return not (args.finetune or args.no_load_optim)

    @property
    def teacher_size(self) -> TeacherSize | None:
        """The size of the only teacher, or the first; None without one, and before it is known."""
        return self.known_teachers[0].size if self.known_teachers else None

    @property
    def known_teachers(self) -> tuple[KnownTeacher, ...]:
        """Every teacher of the run; none before they are known."""
        if self.stored_teacher is not None:
            args = self.stored_teacher.args
            vocab_size = getattr(args, "vocab_size", None) or args.padded_vocab_size
            size = TeacherSize(args.num_layers, args.hidden_size, vocab_size)
            return (KnownTeacher(Role.TEACHER.label, size, self.stored_teacher.folder),)
        found = []
        for named in self.teacher_stores:
            identity = named.store.identity
            size = TeacherSize(identity.num_layers, identity.hidden_size, identity.vocab_size)
            label = f"{Role.TEACHER.label} {named.name}".rstrip()
            found.append(KnownTeacher(label, size, str(named.store.path)))
        return tuple(found)

    @property
    def student(self) -> Model:
        """The student, as this run builds it."""
        return Model(Role.STUDENT, self.args, self.stored_student)

    @property
    def teacher(self) -> Model | None:
        """The teacher; None without one, and before its arguments in this run are known."""
        if self.teacher_args is None:
            return None
        return Model(Role.TEACHER, self.teacher_args, self.stored_teacher)
